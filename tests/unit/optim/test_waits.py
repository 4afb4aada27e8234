"""What the end of a step waited for, told in the device's time: its host is far ahead of it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.optim.gradient_norm import norm_of_whole_model
from mhc_dist.optim.reduction import Reduction, ReductionUnderWay


class DeviceClock:
    """Time passes in what the device does, here ten seconds between a mark and the next."""

    def __init__(self) -> None:
        self.num_marks = 0
        self.asked: list[Sequence[Any]] = []

    def mark(self) -> int:
        self.num_marks += 1
        return self.num_marks

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        self.asked.append(marks)
        return [10.0 * mark for mark in marks]


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_the_norm_tells_the_devices_wait_for_other_ranks() -> None:
    """Oracle: by hand: norm 5 over 2 data ranks; the sum over all ranks lies between two marks."""
    clock = DeviceClock()
    found = norm_of_whole_model([torch.tensor([3.0, 4.0])], [torch.tensor(1.0)], 2, clock)
    assert found == (2.5, True, 10.0)
    assert clock.num_marks == 2


def test_a_reduction_is_timed_on_the_device_and_only_once_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: by hand: 10 s until the device gets to the wait, 10 s of waiting; nobody asks before `cost`."""
    waits: list[str] = []

    class Work:
        def wait(self) -> None:
            waits.append("device")

    def reduce(partition: Tensor, flat: Tensor, group: Any, async_op: bool) -> Work:
        return Work()

    monkeypatch.setattr(dist, "reduce_scatter_single", reduce)
    clock, group, flat = DeviceClock(), dist.GroupMember.WORLD, torch.zeros(4)
    under_way = ReductionUnderWay.start([flat[:2], flat], [flat, flat], [group, group], clock)
    under_way.wait()
    assert waits == ["device"], "one buffer is reduced, the other is whole"
    assert not clock.asked
    assert under_way.cost() == Reduction(seconds=20.0, exposed_seconds=10.0, num_bytes=8)
