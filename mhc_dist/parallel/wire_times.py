"""How long transfers take that nothing delays, measured once before the first step.

The fastest of a few transfers counts: what is slower than that was slowed down by something else. Messages
are bounced between neighbours and half of a round trip is taken, so that no two clocks are compared. A rank
that has no neighbour, or whose expert group is itself alone, transfers nothing and waits for nothing. What is
timed or opened here is not opened within the time limit of step 1's first actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.pipeline.wire import MeasuredWires, Wire

SMALL_BYTES = 1024
NUM_TRANSFERS = 5
"""Of each size; the first one also opens connections."""

Channels = Mapping[tuple[int, int], dist.ProcessGroup]


def measure_wires(
    channels: Channels,
    expert_groups: Sequence[dist.ProcessGroup],
    rank: int,
    message_bytes: int,
    exchange_bytes: int,
    device: torch.device,
) -> MeasuredWires:
    """Time this rank's links with transfers of a few bytes and of the sizes that the run will have.

    Collective over neighbours and expert groups: every rank calls it at the same place of its start.
    channels: as `ProcessGroups.channels`, by world ranks. expert_groups: of equal ranks; the first one is
    timed, the others are opened by an exchange as well. exchange_bytes: what a rank sends in an exchange.
    """
    sizes = (SMALL_BYTES, max(message_bytes, 2 * SMALL_BYTES))
    peers = sorted({a + b - rank for a, b in channels})
    bounced: dict[int, float] = dict.fromkeys(sizes, 0.0)
    # In the order of pairs (lower rank, higher rank), the same on all ranks: nobody waits in a circle.
    for peer in sorted(peers, key=lambda peer: (min(rank, peer), max(rank, peer))):
        if (rank, peer) in channels and (peer, rank) in channels:
            for size in sizes:
                buffer = torch.zeros(size, dtype=torch.uint8, device=device)
                bounced[size] = max(bounced[size], _bounce(channels, rank, peer, buffer))
    exchanged = {SMALL_BYTES: 0.0, 2 * SMALL_BYTES: 0.0}
    group_size = dist.get_world_size(expert_groups[0])
    if group_size > 1:
        for other in expert_groups[1:]:
            _exchange(other, group_size, SMALL_BYTES, device)
        sizes = (SMALL_BYTES, max(exchange_bytes, 2 * SMALL_BYTES))
        exchanged = {size: _exchange(expert_groups[0], group_size, size, device) for size in sizes}
    return MeasuredWires(message=wire_through(bounced), exchange=wire_through(exchanged))


def wire_through(seconds_of: Mapping[int, float]) -> Wire:
    """The line through the times of two sizes; a noisy pair gives neither a negative slope nor offset."""
    (small, fast), (large, slow) = sorted(seconds_of.items())
    slope = max(0.0, (slow - fast) / (large - small))
    return Wire(max(0.0, min(fast, slow) - slope * small), slope)


def _fastest(transfer: Callable[[], None]) -> float:
    seconds = []
    for _ in range(NUM_TRANSFERS):
        start = perf_counter()
        transfer()
        seconds.append(perf_counter() - start)
    return min(seconds)


def _bounce(channels: Channels, rank: int, peer: int, buffer: Tensor) -> float:
    """Half of a round trip of `buffer`; the lower rank serves."""
    there, back = channels[rank, peer], channels[peer, rank]

    def send() -> None:
        dist.send(buffer, peer, group=there)

    def receive() -> None:
        dist.recv(buffer, peer, group=back)
        _landed(buffer)

    def serve() -> None:
        send()
        receive()

    def return_it() -> None:
        receive()
        send()

    if rank < peer:
        return _fastest(serve) / 2
    # From one return to the next is a round trip as well, seen from the other end.
    first = perf_counter()
    return_it()
    trips = []
    for _ in range(NUM_TRANSFERS - 1):
        return_it()
        now = perf_counter()
        trips.append(now - first)
        first = now
    return min(trips) / 2


def _exchange(group: dist.ProcessGroup, group_size: int, num_bytes: int, device: torch.device) -> float:
    """An even all-to-all in which each rank sends about `num_bytes` to others."""
    piece = max(1, num_bytes // (group_size - 1))
    sent = torch.zeros(group_size * piece, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)

    def exchange() -> None:
        dist.all_to_all_single(received, sent, group=group)
        _landed(received)

    return _fastest(exchange)


def _landed(tensor: Tensor) -> None:
    """Only data that the host can read has landed: on a device, transfers return before they are over."""
    tensor[:1].item()
