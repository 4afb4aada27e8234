"""ZB1P (zero bubble H1, Qi et al. 2023): 1F1B with the weight half put off to fill the drain.

Rank r runs r weight halves late, so every rank holds the P microbatches that rank 0 of 1F1B holds anyway.
"""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.writer import SlotWriter


def zb1p(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """One chunk per rank; any number of microbatches."""
    writers = [SlotWriter() for _ in range(num_ranks)]
    for rank, writer in enumerate(writers):
        ahead = min(num_microbatches, num_ranks - 1 - rank)
        for _ in range(ahead):
            writer.forward(rank)
        for m in range(num_microbatches):
            if ahead + m < num_microbatches:
                writer.forward(rank)
            writer.input_gradient(rank)
            if m >= rank:
                writer.weight_gradient()
        while writer.num_put_off:
            writer.weight_gradient()
    ranks = tuple(tuple(writer.slots) for writer in writers)
    return CoarseSchedule("zb1p", num_microbatches, tuple(range(num_ranks)), ranks)
