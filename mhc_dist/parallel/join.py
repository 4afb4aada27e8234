"""Join a run: meet the other ranks, make sure that all mean the same run, then build the world."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

from mhc_dist.parallel.process_groups import RankPlace, init_distributed, open_store
from mhc_dist.parallel.roll_call import Entry, Roll, roll_call


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
    store = open_store(place, join_seconds)
    own = Entry(place.rank, place.world_size, node, socket.gethostname(), os.getpid(), dict(facts))
    roll = roll_call(store, own, join_seconds)
    counted = Place(
        place.rank,
        place.world_size,
        roll.local_rank(place.rank),
        roll.local_world_size(place.rank),
        place.master_addr,
        place.master_port,
    )
    return Joined(counted, init_distributed(counted, backend, timeout_seconds, store), roll)


def versions() -> dict[str, str]:
    """Versions that have to be equal on all ranks."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # From package metadata: importing it takes seconds.
        "deepspeed": metadata.version("deepspeed"),
    }
