"""What a start costs that grows with the number of ranks, measured in one process for worlds of any size."""

from __future__ import annotations

import json
from dataclasses import asdict
from time import process_time
from typing import Any

from mhc_dist.parallel.roll_call import Entry
from mhc_dist.topology import Topology

PIPELINE, EXPERT = 8, 8

FACTS = {name: "0" * 64 for name in ("code", "config", "program", "versions")}
"""As many hashes as a rank reports of itself."""


def starting_figures(world: int) -> dict[str, Any]:
    """Groups of `world` ranks: seconds to list and to pass them on this rank, a member of few of them; bytes
    of the roll, which every rank reads.
    """
    topology = Topology(PIPELINE, world // PIPELINE, EXPERT)
    start = process_time()
    listed = [
        topology.all_expert_groups(),
        topology.all_expert_groups(),
        topology.all_data_groups(),
        topology.all_channels(),
    ]
    list_seconds = process_time() - start
    groups = [group for some in listed for group in some]
    entry = Entry(world - 1, world, "node-0123", "host-0123.cluster", 123456, FACTS)
    roll_bytes = world * len(json.dumps(asdict(entry)))
    return {
        "ranks": world,
        "pipeline": PIPELINE,
        "groups": len(groups),
        "list_seconds": list_seconds,
        "create_seconds": create_seconds(groups, world),
        "roll_bytes": roll_bytes,
        "roll_bytes_served": roll_bytes * world,
    }


def create_seconds(groups: list[tuple[int, ...]], world: int) -> float:
    """Processor seconds in which one rank goes through the creation of all groups, on torch's fake backend:
    no connection is made, so this is the part that every rank pays for groups it is not in.
    """
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    start = process_time()
    for group in groups:
        dist.new_group(list(group))
    seconds = process_time() - start
    dist.destroy_process_group()
    return seconds
