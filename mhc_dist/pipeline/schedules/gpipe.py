"""GPipe: all forwards, then all backwards. Simple, and the one that holds most activations."""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot


def gpipe(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """One chunk per rank; any number of microbatches."""
    ranks: list[tuple[Slot, ...]] = [
        tuple(Op(kind, rank, m) for kind in (OpKind.F, OpKind.B) for m in range(num_microbatches))
        for rank in range(num_ranks)
    ]
    return CoarseSchedule("gpipe", num_microbatches, tuple(range(num_ranks)), tuple(ranks))
