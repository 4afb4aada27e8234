"""1F1B: every rank holds one chunk and alternates forward and backward once the pipeline is full."""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot


def one_f_one_b(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """Rank r runs P - 1 - r forwards ahead, then one forward and one backward in turn, then drains."""
    ranks: list[tuple[Slot, ...]] = []
    for rank in range(num_ranks):
        ahead = min(num_microbatches, num_ranks - 1 - rank)
        slots: list[Slot] = [Op(OpKind.F, rank, m) for m in range(ahead)]
        for m in range(num_microbatches):
            if ahead + m < num_microbatches:
                slots.append(Op(OpKind.F, rank, ahead + m))
            slots.append(Op(OpKind.B, rank, m))
        ranks.append(tuple(slots))
    return CoarseSchedule("1f1b", num_microbatches, tuple(range(num_ranks)), tuple(ranks))
