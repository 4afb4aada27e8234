"""DualPipe (DeepSeek, 2024): two copies of the model in opposite directions, forwards and backwards paired.

Rank r holds stage r of the first copy and stage P - 1 - r of the second. Half of the microbatches enter at
each end and meet in the middle; from either end it looks like DualPipeV over P/2 ranks.
"""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Slot
from mhc_dist.pipeline.schedules.dualpipev import write_dual_rank
from mhc_dist.pipeline.schedules.layout import mirrored_copies
from mhc_dist.pipeline.schedules.writer import SlotWriter


def dualpipe(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """Needs an even P and an even M of at least 2P."""
    if num_ranks % 2:
        raise ValueError(
            f"num_ranks={num_ranks} is odd: dualpipe pairs rank r with rank P-1-r."
            f" Set parallel.pipeline to {num_ranks + 1} or use dualpipev."
        )
    if num_microbatches % 2 or num_microbatches < 2 * num_ranks:
        needed = max(2 * num_ranks, num_microbatches + num_microbatches % 2)
        raise ValueError(
            f"num_microbatches={num_microbatches}: dualpipe needs an even number of at least"
            f" 2*num_ranks={2 * num_ranks}. Set schedule.num_microbatches to {needed}."
        )
    half = num_microbatches // 2
    ranks: list[tuple[Slot, ...]] = []
    for rank in range(num_ranks):
        depth = min(rank, num_ranks - 1 - rank)
        first_copy, second_copy = rank, 2 * num_ranks - 1 - rank
        near_entry = rank < num_ranks // 2
        writer = SlotWriter(first_microbatch=dict.fromkeys(range(num_ranks, 2 * num_ranks), half))
        write_dual_rank(
            writer,
            down=first_copy if near_entry else second_copy,
            up=second_copy if near_entry else first_copy,
            distance_to_turn=num_ranks // 2 - 1 - depth,
            depth=depth,
            num_paired=half - num_ranks + depth + 1,
        )
        ranks.append(tuple(writer.slots))
    return CoarseSchedule(
        "dualpipe", num_microbatches, mirrored_copies(num_ranks), tuple(ranks), num_copies=2
    )
