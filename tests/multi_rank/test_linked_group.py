"""The benches' backend. Oracles: gloo's own results, and the link's arithmetic."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch
import torch.distributed as dist

from mhc_dist.bench.linked_group import BACKEND, Route, register
from mhc_dist.parallel.emulated_link import EmulatedLink
from tests.multi_rank.harness import run_ranks

SLOW = EmulatedLink(latency_seconds=0.15, bytes_per_second=1e5)


def linked(route: Route) -> dist.ProcessGroup:
    register(route)
    group = dist.new_group(backend=BACKEND)
    assert isinstance(group, dist.ProcessGroup)
    return group


def uneven(rank: int, folder: Path | None) -> bool:
    """Rank r sends r + 1 + peer rows to each peer, as halves and as one tensor."""
    group, world = linked(Route(folder)), dist.get_world_size()
    send = [rank + 1 + peer for peer in range(world)]
    receive = [peer + 1 + rank for peer in range(world)]
    rows = torch.arange(sum(send) * 3.0).view(-1, 3) + 100 * rank
    want, got = torch.empty(sum(receive), 3), torch.full((sum(receive), 3), -1.0)
    dist.all_to_all_single(want, rows, receive, send)
    dist.all_to_all_single(got, rows, receive, send, group=group)
    even_want, even_got = torch.empty(world), torch.empty(world)
    dist.all_to_all_single(even_want, torch.arange(float(world)) + rank)
    dist.all_to_all_single(even_got, torch.arange(float(world)) + rank, group=group)
    total = torch.tensor(rank)
    dist.all_reduce(total, group=group)
    seen: list[object] = [None] * world
    dist.all_gather_object(seen, {"rank": rank}, group=group)
    return (
        torch.equal(got, want)
        and torch.equal(even_got, even_want)
        and int(total) == world * (world - 1) // 2
        and seen == [{"rank": r} for r in range(world)]
    )


@pytest.mark.parametrize("through_memory", [True, False])
def test_collectives_give_what_gloo_gives(tmp_path: Path, through_memory: bool) -> None:
    """Oracle: the default group's all-to-all, uneven and even; sums and objects by hand."""
    assert run_ranks(3, uneven, tmp_path if through_memory else None) == [True, True, True]


def flights(rank: int, folder: Path) -> tuple[float, float, bool, float, float]:
    """Seconds of two all-to-alls issued together, whether one was over at once; of one with a late peer, when
    this rank set out for it and when it was over, by the host's one clock."""
    route = Route(folder)
    group = linked(route)
    route.link = EmulatedLink(SLOW.latency_seconds, SLOW.bytes_per_second)
    rows = torch.zeros(2, 1000)
    dist.barrier()
    start = perf_counter()
    works = [dist.all_to_all_single(torch.empty(2, 1000), rows, group=group, async_op=True) for _ in range(2)]
    over = works[0].is_completed()
    works[0].wait()
    first = perf_counter() - start
    works[1].wait()
    both = perf_counter() - start
    dist.barrier()
    start = perf_counter()
    sleep(0.2 * rank)
    dist.all_to_all_single(torch.empty(2, 1000), rows, group=group)
    return first, both, over, start, perf_counter()


def test_exchanges_take_the_links_time_one_after_the_other(tmp_path: Path) -> None:
    """Oracle: 4000 bytes to the peer: 0.15 s + 4000 / 1e5 s = 0.19 s each, the second behind the first; what
    a late peer sends takes as long from when it sends.
    """
    seen = run_ranks(2, flights, tmp_path)
    set_out = seen[1][3]
    for first, both, over, _, end in seen:
        assert not over
        assert first >= 0.19
        assert both >= 2 * 0.19
        assert end - set_out >= 0.2 + 0.19


def messages(rank: int, folder: Path) -> tuple[float, float]:
    """Arrival of a message awaited at once, and of one whose receive was posted late; both ways at once."""
    route = Route(folder)
    group = linked(route)
    route.link = EmulatedLink(SLOW.latency_seconds, SLOW.bytes_per_second)
    peer = 1 - rank
    seconds = []
    for late in (0.0, 0.3):
        tensor = torch.full((1000,), float(rank))
        buffer = torch.empty(1000)
        dist.barrier()
        start = perf_counter()
        sending = [dist.P2POp(dist.isend, tensor, peer, group)]
        works = dist.batch_isend_irecv(sending)
        while perf_counter() - start < late:
            pass
        works += dist.batch_isend_irecv([dist.P2POp(dist.irecv, buffer, peer, group)])
        for work in works:
            work.wait()
        seconds.append(perf_counter() - start)
        assert bool((buffer == peer).all())
    return seconds[0], seconds[1]


def test_messages_count_from_when_both_sides_are_ready(tmp_path: Path) -> None:
    """Oracle: 4000 bytes take 0.19 s, from the SEND, or from the RECV if that was posted 0.3 s later."""
    for early, late in run_ranks(2, messages, tmp_path):
        assert early >= 0.19
        assert late >= 0.3 + 0.19


def broadcasts(rank: int) -> bool:
    """Many small transfers of tensors that nobody keeps."""
    group = linked(Route())
    values = [torch.arange(64).view(torch.uint8) + rank for _ in range(200)]
    for value in values:
        dist.broadcast(value.view(torch.uint8), 0, group=group)
    return all(torch.equal(a, b) for a, b in pairwise(values))


def test_transfers_of_passing_tensors_do_not_lock_up() -> None:
    """Oracle: rank 0's values. gloo's threads let go of tensors while the interpreter is wanted elsewhere."""
    assert run_ranks(2, broadcasts) == [True, True]


def test_backend_is_ready_for_a_world(tmp_path: Path) -> None:
    """Oracle: torch's own name for a group's backend."""
    route = Route()
    dist.init_process_group(register(route), init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert dist.get_backend() == BACKEND
        output = torch.zeros(3)
        dist.all_to_all_single(output, torch.ones(3))
        assert bool((output == 1).all())
    finally:
        dist.destroy_process_group()
