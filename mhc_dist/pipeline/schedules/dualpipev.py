"""DualPipeV (DeepSeek, 2025): two chunks per rank in a V, forwards and backwards paired in the steady state.

In a pair, the forward computes while the backward's experts communicate and the other way round.
"""

from __future__ import annotations

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Slot
from mhc_dist.pipeline.schedules.layout import v_shape
from mhc_dist.pipeline.schedules.writer import SlotWriter


def dualpipev(num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """Needs at least 2P microbatches; with fewer the paired phase would be empty on some ranks."""
    if num_microbatches < 2 * num_ranks:
        most = num_microbatches // 2
        raise ValueError(
            f"num_microbatches={num_microbatches} is less than 2*num_ranks={2 * num_ranks}: dualpipev would"
            f" leave ranks idle. Raise schedule.num_microbatches to at least {2 * num_ranks}"
            + (f" or lower parallel.pipeline to at most {most}." if most else ", or use 1f1b.")
        )
    ranks: list[tuple[Slot, ...]] = []
    for rank in range(num_ranks):
        writer = SlotWriter()
        write_dual_rank(
            writer,
            down=rank,
            up=2 * num_ranks - 1 - rank,
            distance_to_turn=num_ranks - 1 - rank,
            depth=rank,
            num_paired=num_microbatches - 2 * num_ranks + rank + 1,
        )
        ranks.append(tuple(writer.slots))
    return CoarseSchedule("dualpipev", num_microbatches, v_shape(num_ranks), tuple(ranks))


def write_dual_rank(
    writer: SlotWriter, *, down: int, up: int, distance_to_turn: int, depth: int, num_paired: int
) -> None:
    """One rank that serves two chunks, `down` (met early by a microbatch) and `up` (met late).

    distance_to_turn: ranks between this one and where the two paths meet (0 at the meeting point).
    depth: ranks between this one and where microbatches enter.
    num_paired: rounds of the steady state, each a pair (down forward; up backward) and (up forward; down
    backward).
    """
    # Fill: forwards only, until the first microbatch has come back on the way up.
    for _ in range(2 * distance_to_turn):
        writer.forward(down)
    for _ in range(depth + 1):
        writer.forward(down)
        writer.forward(up)
    # The first backwards arrive. Nothing can be paired yet, so the weight half is split off: the gradient
    # leaves earlier and the weight half fills the wait for the next forward.
    for _ in range(distance_to_turn):
        writer.input_gradient(up)
        writer.weight_gradient()
        writer.forward(up)
    # Steady state: two pairs a round.
    for i in range(num_paired):
        if i == 0 and distance_to_turn == 0:
            # At the meeting point the first backward would otherwise wait for this forward's partner.
            writer.forward(down)
            writer.backward(up)
        else:
            writer.pair(down, up)
        writer.pair(up, down)
    # No forwards are left on the way down.
    for _ in range(distance_to_turn):
        writer.backward(up)
        writer.pair(up, down)
    # Drain: in the second half weight gradients are put off, and then fill the waits between gradients.
    half = (depth + 1) // 2
    for i in range(depth + 1):
        split_up = i > half or (i == half and depth % 2 == 1)
        split_down = i >= half
        (writer.input_gradient if split_up else writer.backward)(up)
        (writer.input_gradient if split_down else writer.backward)(down)
    for _ in range(distance_to_turn):
        writer.weight_gradient()
        writer.input_gradient(down)
    while writer.num_put_off:
        writer.weight_gradient()
