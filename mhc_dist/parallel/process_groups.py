"""Every process group of a run, created once and handed to who needs it.

Groups never share a queue by accident. A communicator executes its operations in order, so two kinds of
traffic whose order is not the same on all ranks must not meet on one: forward and backward exchanges have
a group each, and so has every ordered pair of pipeline neighbours. What remains to be agreed on is the
order within one channel, which the validator of a program proves.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mhc_dist.parallel.cuda_settings import check_cuda_settings
from mhc_dist.topology import Topology


class RankPlace(Protocol):
    """What the launcher tells a process about its place (`mhc_launcher.bootstrap.RankEnvironment`)."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_world_size(self) -> int: ...
    @property
    def master_addr(self) -> str: ...
    @property
    def master_port(self) -> int: ...


def own_limit(watched_seconds: float) -> datetime.timedelta:
    """When a transfer ends by itself, in a run that is ended after `watched_seconds` without progress.

    Later than that: the watchdog says what every rank is doing, and a transfer only that it waited. The rank
    that was waiting would be told of as the one that failed.
    """
    return datetime.timedelta(seconds=2 * watched_seconds)


def init_distributed(
    environment: RankPlace,
    backend: Literal["auto", "gloo", "nccl"],
    timeout_seconds: float,
    store: Store | None = None,
) -> torch.device:
    """Join the world and return the device of this rank: cuda:local_rank with nccl, the CPU with gloo.

    `auto` takes nccl where a GPU is visible and gloo elsewhere. `store` is the one that `open_store` gave; by
    default it is opened here. Exports the rank variables that torch and DeepSpeed read. A world of one needs
    neither network nor port. Raises ValueError when the device or the port cannot be had, and for an
    environment in which ranks on GPUs would hang.
    """
    chosen = ("nccl" if torch.cuda.is_available() else "gloo") if backend == "auto" else backend
    device = _device(chosen, environment)
    os.environ.update(
        RANK=str(environment.rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(environment.local_world_size),
        MASTER_ADDR=environment.master_addr,
        MASTER_PORT=str(environment.master_port),
    )
    if store is None:
        store = open_store(environment, timeout_seconds)
    dist.init_process_group(
        chosen,
        store=store,
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=own_limit(timeout_seconds),
    )
    return device


def open_store(environment: RankPlace, timeout_seconds: float) -> Store:
    """The key-value store on which the world meets; rank 0 hosts it, unless torchrun's agent does.

    Returns as soon as this rank is connected: who else is there is for a roll call to find out. Raises
    ValueError when the port is taken or nobody answers at the master address in time.
    """
    if environment.world_size == 1:
        alone: Store = dist.HashStore()  # type: ignore[attr-defined]
        return alone
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environment.master_addr, environment.master_port
    hosts = environment.rank == 0 and not agent_hosts
    try:
        store = TCPStore(
            address,
            port,
            environment.world_size,
            is_master=hosts,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        who = f"rank {environment.rank} of {environment.world_size}"
        if hosts:
            raise ValueError(
                f"{who} cannot listen on {address}:{port} where the ranks are to meet: {reason}. Is the port"
                " taken by another program, or the address not one of this host? Choose a free port"
                " (--master-port, MASTER_PORT) or the right address (--master-addr, MASTER_ADDR)."
            ) from error
        raise ValueError(
            f"{who} could not meet the others at {address}:{port} within {timeout_seconds:g} s: {reason}. Was"
            " rank 0 started, is the port another program's, or is the address not reachable from here?"
            " Start all nodes, and choose a free port (--master-port, MASTER_PORT) and the right address"
            " (--master-addr, MASTER_ADDR)."
        ) from error
    # A restart by torchrun finds the keys of the attempt before it in the agent's store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed: Store = PrefixStore(f"mhc_dist/{attempt}", store)
    return prefixed


def run_store() -> Store:
    """A client of the world's key-value store for one user alone; rank 0's process hosts the store."""
    # Private, but the only way to the store behind env://: a second one would need a second free port.
    store: Store = dist.distributed_c10d._get_default_store()
    clone: Store = store.clone()  # type: ignore[attr-defined]  # missing from the stubs
    return clone


def destroy() -> None:
    """Leave the world. Without it a process ends with exit code -6 on some backends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abandon() -> None:
    """Leave a world in which something went wrong: what is still under way has lost its other end.

    `destroy` would wait for it, for ever or until NCCL's own watchdog kills the process.
    """
    if dist.is_initialized():
        # Private, but torch's only call for this.
        dist.distributed_c10d._abort_process_group()


def _device(backend: str, environment: RankPlace) -> torch.device:
    if backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("train.backend=nccl, but no GPU is visible. Set train.backend to gloo or auto.")
    if environment.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {environment.local_rank} has no GPU of its own: {torch.cuda.device_count()} are"
            f" visible for {environment.local_world_size} processes. Start at most one process per GPU."
        )
    check_cuda_settings(os.environ)
    device = torch.device("cuda", environment.local_rank)
    torch.cuda.set_device(device)
    return device


def create_group(
    all_ranks: Sequence[Sequence[int]],
    rank: int,
    timeout_seconds: float,
    backend: str | None = None,
    *,
    urgent: bool = False,
) -> dist.ProcessGroup:
    """Create one group per entry of `all_ranks` and return the one that holds `rank`.

    Collective over the world: every rank calls it with the same list. urgent: as in `_new_group`.
    """
    own: dist.ProcessGroup | None = None
    for ranks in all_ranks:
        group = _new_group(ranks, timeout_seconds, backend, urgent=urgent)
        if rank in ranks:
            own = group
    assert own is not None, f"rank {rank} is in none of {all_ranks}"
    return own


def _new_group(
    ranks: Sequence[int], timeout_seconds: float, backend: str | None = None, *, urgent: bool
) -> dist.ProcessGroup:
    """A group; its limit is given because torch would fall back to 30 minutes, not to that of the world.

    urgent: on a GPU its kernels get the next free multiprocessors. Others wait until the compute that is
    queued has been through, so that there is nothing left to overlap with.
    """
    timeout = own_limit(timeout_seconds)
    options = None
    if urgent and (backend or dist.get_backend()) == dist.Backend.NCCL:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout  # what torch would set it to, with a warning that it did
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=timeout, backend=backend, pg_options=options
    )
    return group


def open_group(group: dist.ProcessGroup, device: torch.device) -> None:
    """Sum a number over the group. Collective over it.

    NCCL makes a communicator when it is first used, which takes seconds. Before step 1 nobody minds; within
    it, an action has a time limit.
    """
    one = torch.ones(1, device=device)
    dist.all_reduce(one, group=group)
    one.item()  # on a device, the call returns before it is over


@dataclass(frozen=True)
class ProcessGroups:
    """The groups this rank belongs to.

    `channels[(source, destination)]` carries what `source` sends to its pipeline neighbour `destination`
    (world ranks; one of them is this rank). Within the two-member group of a channel, address the peer by
    its world rank. `control` is always gloo, for agreement on the host even when `data` lives on GPUs.
    `checkpoints` is gloo, too, and a save's alone: it talks on it while training goes on.
    """

    topology: Topology
    expert_forward: dist.ProcessGroup
    expert_backward: dist.ProcessGroup
    data: dist.ProcessGroup
    channels: dict[tuple[int, int], dist.ProcessGroup]
    control: dist.ProcessGroup
    checkpoints: dist.ProcessGroup

    @staticmethod
    def build(
        topology: Topology,
        timeout_seconds: float = 60.0,
        links: Iterable[tuple[int, int]] | None = None,
        save_seconds: float = 60.0,
    ) -> ProcessGroups:
        """Collective over the world. Raises ValueError when topology and world do not fit together.

        timeout_seconds, save_seconds: without progress, of a step and of a save; see `own_limit`.
        links: pairs of pipeline ranks that exchange messages (`Program.links`); by default, neighbours.
        """
        topology.check()
        topology.check_world_size(dist.get_world_size())
        if topology.rank != dist.get_rank():
            raise ValueError(
                f"topology of rank {topology.rank} on rank {dist.get_rank()}. Use topology.at(rank)."
            )
        rank = topology.rank
        experts = topology.all_expert_groups()
        # Every rank creates every group, in this order, since torch counts them to name them; only members
        # keep them. One without this rank takes 30 us and no word with the store: measured, 0.06 s for the
        # 2194 groups of 1024 ranks. use_local_synchronization would spare that, but names a group by its
        # members and by how many each has joined before: another number at a pipeline's end than beside it.
        expert_forward = create_group(experts, rank, timeout_seconds, urgent=True)
        expert_backward = create_group(experts, rank, timeout_seconds, urgent=True)
        data = create_group(topology.all_data_groups(), rank, timeout_seconds)
        channels: dict[tuple[int, int], dist.ProcessGroup] = {}
        for pair in topology.all_channels(links):
            group = _new_group(pair, timeout_seconds, urgent=True)
            if rank in pair:
                channels[pair] = group
        world = [range(topology.world_size)]
        control = create_group(world, rank, timeout_seconds, backend="gloo")
        checkpoints = create_group(world, rank, save_seconds, backend="gloo")
        return ProcessGroups(topology, expert_forward, expert_backward, data, channels, control, checkpoints)
