"""The order of forwards when nothing is trained: greedy, the chunk nearest the end first."""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot


def forward_order(chunk_rank: tuple[int, ...], num_microbatches: int) -> CoarseSchedule:
    """In each time step every rank runs the ready forward of its last chunk that has one.

    Works for every layout of one model and every number of microbatches.
    """
    num_ranks = max(chunk_rank) + 1
    done = [0] * len(chunk_rank)
    slots: list[list[Slot]] = [[] for _ in range(num_ranks)]
    while done[-1] < num_microbatches:
        before = tuple(done)
        for rank in range(num_ranks):
            for chunk in reversed(range(len(chunk_rank))):
                ready = num_microbatches if chunk == 0 else before[chunk - 1]
                if chunk_rank[chunk] == rank and before[chunk] < ready:
                    slots[rank].append(Op(OpKind.F, chunk, before[chunk]))
                    done[chunk] += 1
                    break
    return CoarseSchedule("forward_only", num_microbatches, chunk_rank, tuple(tuple(s) for s in slots))
