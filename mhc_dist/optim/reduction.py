"""The sum of main gradients over replicas: each rank's partition receives its part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Clock(Protocol):
    """When this rank got to a point of its work; on a device, when the device did. `Streams` are one."""

    def mark(self) -> Any: ...

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Times of the marks; waits for the last of them."""
        ...


class HostClock:
    """For work that is over when its call returns."""

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return list(marks)


def open_groups(groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Reduce a few zeros over each group. Collective over them.

    NCCL makes a communicator when it is first used, which takes seconds: not within the limit of a step.
    """
    partitions = [torch.zeros(1, device=device) for _ in groups]
    flats = [torch.zeros(dist.get_world_size(group), device=device) for group in groups]
    ReductionUnderWay.start(partitions, flats, groups, HostClock()).wait()
    torch.cat(partitions).tolist()  # on a device, the wait above is not the host's


class Reduction(NamedTuple):
    """What a reduction cost on this rank: seconds under way, seconds only waited for, bytes sent."""

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    num_bytes: int = 0


@dataclass
class ReductionUnderWay:
    """Reduce-scatters of all flat buffers, started together."""

    works: list[dist.Work]
    num_bytes: int
    clock: Clock
    marks: list[Any] = field(default_factory=list)

    @classmethod
    def start(
        cls,
        partitions: Sequence[Tensor],
        flats: Sequence[Tensor],
        groups: Sequence[dist.ProcessGroup],
        clock: Clock,
    ) -> ReductionUnderWay:
        """`partitions[i]` (numel / size of `groups[i]`,) gets its part of the sum of `flats[i]`, in place.

        A rank sends all of a buffer but its own part.
        """
        marks, works, num_bytes = [clock.mark()], [], 0
        for partition, flat, group in zip(partitions, flats, groups, strict=True):
            if partition.numel() == flat.numel():
                continue  # nobody else holds these parameters
            works.append(dist.reduce_scatter_single(partition, flat, group=group, async_op=True))
            num_bytes += (flat.numel() - partition.numel()) * flat.element_size()
        return cls(works, num_bytes, clock, marks)

    def wait(self) -> None:
        """What this rank computes from now on comes after all sums. On a device the host waits for none."""
        self.marks.append(self.clock.mark())
        for work in self.works:
            work.wait()
        self.marks.append(self.clock.mark())

    def cost(self) -> Reduction:
        """What it cost. Waits for the sums: ask when they are known to be there."""
        started, waiting, ended = self.clock.seconds(self.marks)
        return Reduction(ended - started, ended - waiting, self.num_bytes)
