"""Interleaved 1F1B (Narayanan et al. 2021): several chunks per rank, dealt round robin, for a shorter fill.

Microbatches travel in groups of P: a group runs through a rank's first chunk, then its second, and so on.
"""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot
from mhc_dist.pipeline.schedules.layout import round_robin


def interleaved(num_ranks: int, num_microbatches: int, num_chunks_per_rank: int = 2) -> CoarseSchedule:
    """Needs at least 2 chunks per rank, and microbatches in whole groups of P."""
    if num_chunks_per_rank < 2:
        raise ValueError(
            f"num_chunks_per_rank={num_chunks_per_rank}: interleaved needs at least 2. Use 1f1b for 1."
        )
    if num_microbatches % num_ranks:
        lower = num_microbatches // num_ranks * num_ranks
        nearest = f"{lower} or {lower + num_ranks}" if lower else str(num_ranks)
        raise ValueError(
            f"num_microbatches={num_microbatches} is not a multiple of num_ranks={num_ranks}, which"
            f" interleaved needs. Set schedule.num_microbatches to {nearest}."
        )
    total = num_microbatches * num_chunks_per_rank
    ranks: list[tuple[Slot, ...]] = []
    for rank in range(num_ranks):

        def op(kind: OpKind, index: int, rank: int = rank) -> Op:
            """The index-th forward or backward of this rank."""
            group, place = divmod(index, num_ranks * num_chunks_per_rank)
            turn, member = divmod(place, num_ranks)
            if kind is OpKind.B:
                turn = num_chunks_per_rank - 1 - turn
            return Op(kind, turn * num_ranks + rank, group * num_ranks + member)

        ahead = min(total, 2 * (num_ranks - 1 - rank) + (num_chunks_per_rank - 1) * num_ranks)
        slots: list[Slot] = [op(OpKind.F, i) for i in range(ahead)]
        for i in range(total):
            if ahead + i < total:
                slots.append(op(OpKind.F, ahead + i))
            slots.append(op(OpKind.B, i))
        ranks.append(tuple(slots))
    chunk_rank = round_robin(num_ranks, num_chunks_per_rank)
    return CoarseSchedule("interleaved", num_microbatches, chunk_rank, tuple(ranks))
