"""The sum of main gradients over replicas: each rank's partition receives its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def open_groups(groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Reduce a few zeros over each group. Collective over them.

    NCCL makes a communicator when it is first used, which takes seconds: not within the limit of a step.
    """
    partitions = [torch.zeros(1, device=device) for _ in groups]
    flats = [torch.zeros(dist.get_world_size(group), device=device) for group in groups]
    ReductionUnderWay.start(partitions, flats, groups).wait()
    torch.cat(partitions).tolist()  # on a device, the wait above is not the host's


class Reduction(NamedTuple):
    """What a reduction cost on this rank: seconds under way, seconds only waited for, bytes sent."""

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True)
class ReductionUnderWay:
    """Reduce-scatters of all flat buffers, started together."""

    works: list[dist.Work]
    started: float
    num_bytes: int

    @classmethod
    def start(
        cls, partitions: Sequence[Tensor], flats: Sequence[Tensor], groups: Sequence[dist.ProcessGroup]
    ) -> ReductionUnderWay:
        """`partitions[i]` (numel / size of `groups[i]`,) gets its part of the sum of `flats[i]`, in place.

        A rank sends all of a buffer but its own part.
        """
        started, works, num_bytes = perf_counter(), [], 0
        for partition, flat, group in zip(partitions, flats, groups, strict=True):
            if partition.numel() == flat.numel():
                continue  # nobody else holds these parameters
            works.append(dist.reduce_scatter_single(partition, flat, group=group, async_op=True))
            num_bytes += (flat.numel() - partition.numel()) * flat.element_size()
        return cls(works, started, num_bytes)

    def wait(self) -> Reduction:
        """Block until all sums are there."""
        waiting = perf_counter()
        for work in self.works:
            work.wait()
        now = perf_counter()
        return Reduction(now - self.started, now - waiting, self.num_bytes)
