"""ZBV (zero bubble V, Qi et al. 2024): two chunks per rank in a V, every backward split, almost no bubble."""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.layout import v_shape
from mhc_dist.pipeline.schedules.writer import SlotWriter


def zbv(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """Needs at least 2P - 1 microbatches to fill the V before the first backward comes back."""
    if num_microbatches < 2 * num_ranks - 1:
        raise ValueError(
            f"num_microbatches={num_microbatches} is less than 2*num_ranks-1={2 * num_ranks - 1}: zbv could"
            f" not fill the pipeline. Raise schedule.num_microbatches to at least {2 * num_ranks - 1} or"
            f" lower parallel.pipeline to at most {(num_microbatches + 1) // 2}."
        )
    ranks = tuple(tuple(_rank(rank, num_ranks, num_microbatches).slots) for rank in range(num_ranks))
    return CoarseSchedule("zbv", num_microbatches, v_shape(num_ranks), ranks)


def _rank(rank: int, num_ranks: int, num_microbatches: int) -> SlotWriter:
    writer = SlotWriter()
    down, up = rank, 2 * num_ranks - 1 - rank
    distance_to_turn = num_ranks - 1 - rank
    # Fill: until the first microbatch is back on the way up, then both ways in turn.
    for _ in range(2 * distance_to_turn + 1):
        writer.forward(down)
    for _ in range(rank):
        writer.forward(up)
        writer.forward(down)
    for _ in range(distance_to_turn + 1):
        writer.forward(up)
        writer.input_gradient(up)
        writer.weight_gradient()
    # Steady state: one microbatch each way, its weight half at once, so memory stays level.
    while writer.num_forwards(up) < num_microbatches:
        if writer.num_forwards(down) < num_microbatches:
            writer.forward(down)
        writer.input_gradient(down)
        writer.weight_gradient()
        writer.forward(up)
        writer.input_gradient(up)
        writer.weight_gradient()
    # Drain: gradients go first, weight halves fill what is left.
    for _ in range(rank):
        writer.input_gradient(down)
        writer.input_gradient(up)
    for _ in range(distance_to_turn + 1):
        writer.input_gradient(down)
        writer.weight_gradient()
    while writer.num_put_off:
        writer.weight_gradient()
    return writer
