from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from mhc_dist.parallel.process_groups import ProcessGroups, create_group, destroy, init_distributed
from mhc_dist.topology import Topology
from tests.multi_rank.harness import RankFailedError, run_ranks


@dataclass(frozen=True)
class Place:
    """What the launcher would say."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


def test_every_group_holds_the_ranks_the_topology_names() -> None:
    # Oracle: Topology, whose groups are tested by brute force; a sum of 2^rank names the members.
    def members(rank: int) -> None:
        place = Topology(2, 4, 2, rank)
        groups = ProcessGroups.build(place)
        expected = {
            groups.expert_forward: place.expert_group_ranks,
            groups.expert_backward: place.expert_group_ranks,
            groups.data: place.data_group_ranks,
            groups.control: range(8),
        }
        for group, ranks in expected.items():
            mask = torch.tensor(2**rank)
            dist.all_reduce(mask, group=group)
            assert mask.item() == sum(2**member for member in ranks)
        assert len(expected) == 4, "groups must be distinct communicators"

    run_ranks(8, members)


def test_channels_carry_both_directions_at_once() -> None:
    # Oracle: the sender's rank, and a send order that differs from the receive order across channels.
    def exchange(rank: int) -> None:
        place = Topology(3, 2, 1, rank)
        channels = ProcessGroups.build(place).channels
        assert set(channels) == {pair for pair in place.all_channels() if rank in pair}
        inbox = {peer: torch.zeros(()) for peer in place.neighbour_ranks}
        works = [
            dist.irecv(inbox[peer], src=peer, group=channels[(peer, rank)])
            for peer in reversed(place.neighbour_ranks)
        ]
        for peer in place.neighbour_ranks:
            works.append(dist.isend(torch.tensor(10.0 * rank + peer), dst=peer, group=channels[(rank, peer)]))
        for work in works:
            assert work is not None
            work.wait()
        for peer, received in inbox.items():
            assert received.item() == 10 * peer + rank

    run_ranks(6, exchange)


def test_forward_and_backward_exchanges_may_be_issued_in_different_orders() -> None:
    # Oracle: the sums; on one shared communicator the two would be matched with each other.
    def cross(rank: int) -> None:
        groups = ProcessGroups.build(Topology(1, 2, 2, rank))
        forward, backward = torch.tensor(1.0 + rank), torch.tensor(10.0 + rank)
        order = [(forward, groups.expert_forward), (backward, groups.expert_backward)]
        works = [
            dist.all_reduce(value, group=group, async_op=True)
            for value, group in (order if rank == 0 else reversed(order))
        ]
        for work in works:
            work.wait()
        assert (forward.item(), backward.item()) == (3.0, 21.0)

    run_ranks(2, cross)


def test_groups_end_a_wait_after_their_own_timeout() -> None:
    # Oracle: the clock; torch alone would give a new group 30 minutes.
    def wait_alone(rank: int) -> None:
        group = create_group([[0, 1]], rank, timeout_seconds=1.0)
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"(?i)timed out"):
                dist.all_reduce(torch.ones(1), group=group)

    run_ranks(2, wait_alone, timeout_seconds=20)


def test_a_world_that_does_not_fit_is_refused() -> None:
    # Oracle: the wording promised to users.
    def build(rank: int) -> None:
        ProcessGroups.build(Topology(2, 2, 2, rank))

    with pytest.raises(RankFailedError, match=r"2 processes were started, .* needs 4"):
        run_ranks(2, build)


def test_a_world_of_one_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: a port that cannot be bound because it is taken.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = Place(master_port=taken.getsockname()[1])
        try:
            assert init_distributed(place, "gloo", 5.0) == torch.device("cpu")
            assert dist.get_world_size() == 1
            groups = ProcessGroups.build(Topology(1, 1, 1))
            assert groups.channels == {}
        finally:
            destroy()
    assert not dist.is_initialized()


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Oracle: a port that another socket holds.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} .*Choose a free port"):
            init_distributed(Place(world_size=2, local_world_size=2, master_port=port), "gloo", 2.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nccl_without_a_gpu_is_refused() -> None:
    # Oracle: the wording promised to users.
    with pytest.raises(ValueError, match=r"backend=nccl, but no GPU is visible.*gloo or auto"):
        init_distributed(Place(), "nccl", 5.0)
