"""Join a run: meet the other ranks, make sure that all mean the same run, then build the world."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
from torch._C._distributed_c10d import Store

from mhc_dist.parallel.open_files import allow_open_files
from mhc_dist.parallel.process_groups import RankPlace, init_distributed, open_store
from mhc_dist.parallel.roll_call import Entry, Roll, RollCallError, UnderWayError, roll_call

LOOK_SECONDS = 0.5
"""Between looks whether an old run's store is still there."""


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place in the run, after all have said where they are."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


@dataclass(frozen=True)
class Joined:
    place: Place
    device: torch.device
    roll: Roll


def join_run(
    place: RankPlace,
    backend: Literal["auto", "gloo", "nccl"],
    facts: Mapping[str, str],
    *,
    node: str,
    join_seconds: float,
    timeout_seconds: float,
) -> Joined:
    """Collective over the world.

    Args:
        place: what the launcher said; local ranks are counted anew, since launchers differ in them (DeepSpeed
            gives rank modulo slots, which on hosts with different numbers of slots is not the order).
        facts: what must be equal on all ranks, by the name that a message should use.
        node: tells this node from the others; equal on its ranks.
        join_seconds: how long to wait for other ranks.
        timeout_seconds: of operations afterwards.

    Raises ValueError when the run cannot start: the same sentence on every rank that came.
    """
    allow_open_files(place.world_size, hosts_store=place.rank == 0)
    own = Entry(place.rank, place.world_size, node, socket.gethostname(), os.getpid(), dict(facts))
    store, roll = meet(lambda seconds: open_store(place, seconds), own, join_seconds)
    counted = Place(
        place.rank,
        place.world_size,
        roll.local_rank(place.rank),
        roll.local_world_size(place.rank),
        place.master_addr,
        place.master_port,
    )
    return Joined(counted, init_distributed(counted, backend, timeout_seconds, store), roll)


def meet(open_next: Callable[[float], Store], own: Entry, join_seconds: float) -> tuple[Store, Roll]:
    """The store on which all ranks have met, and who they are.

    Where every node starts its processes by itself, one that crashed may be back before the others have
    noticed: it finds the store of the old run, which ends soon, and waits for the next one.

    Raises RollCallError when the ranks do not come or do not fit together, or when a run that has our rank
    already is still there after `join_seconds`.
    """
    deadline = time.monotonic() + join_seconds
    while True:
        left = max(deadline - time.monotonic(), 1.0)
        store = open_next(left)
        try:
            return store, roll_call(store, own, left)
        except UnderWayError:
            if not _goes_away(store, deadline):
                raise RollCallError(
                    f"{own} came to a run that has begun with another rank {own.rank} and is still there"
                    f" after {join_seconds:g} s. Is this a second run on the same master port, or a node"
                    " started twice? Give every run its own port, or end the first one.",
                    author=True,
                ) from None


def _goes_away(store: Store, deadline: float) -> bool:
    """Whether the process that hosts the store ends in time."""
    while time.monotonic() < deadline:
        try:
            store.check(["roll_call/verdict"])
        except (RuntimeError, OSError):  # what a store raises whose other end is gone
            return True
        time.sleep(LOOK_SECONDS)
    return False


def versions() -> dict[str, str]:
    """Versions that have to be equal on all ranks."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # From package metadata: importing it takes seconds.
        "deepspeed": metadata.version("deepspeed"),
    }
