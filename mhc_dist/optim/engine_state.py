"""The optimizer's state under the parameters' names: how flat partitions are cut into fragments of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from mhc_dist.optim.parameter_groups import ParameterGroup


@dataclass(frozen=True)
class ParameterState:
    """One parameter's optimizer state, each tensor fp32 and shaped like the parameter."""

    master: Tensor
    first_moment: Tensor
    second_moment: Tensor


@dataclass(frozen=True)
class EngineState:
    """All that the optimizer of this rank's parameters knows, gathered from its replicas.

    `num_steps` counts `finish_step` calls and drives the learning rate; `num_updates` counts those that were
    applied and drives Adam's bias correction.
    """

    num_steps: int
    num_updates: int
    parameters: dict[str, ParameterState]


@dataclass(frozen=True)
class FlatFragment:
    """Elements start .. stop-1 of a flattened parameter; they begin at element `begin` of a partition."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    begin: int

    def of(self, partition: Tensor) -> Tensor:
        """Its elements in a partition or a copy of one; a view, (stop - start,)."""
        return partition[self.begin : self.begin + self.stop - self.start]


@dataclass(frozen=True)
class Partition:
    """What one rank's optimizer owns of a parameter group: flat fp32 tensors of equal length.

    The partitions of all ranks together hold every element of every parameter exactly once. What lies
    beyond the last fragment is padding.
    """

    fragments: tuple[FlatFragment, ...]
    master: Tensor
    first_moment: Tensor
    second_moment: Tensor


@dataclass(frozen=True)
class FlatGroup:
    """A parameter group laid out end to end, padded, and cut into one equal partition per rank of `group`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    group: dist.ProcessGroup

    @staticmethod
    def of(parameters: ParameterGroup, group: dist.ProcessGroup) -> FlatGroup:
        shapes = tuple(tuple(parameter.shape) for parameter in parameters.parameters)
        return FlatGroup(parameters.names, shapes, group)

    def gather(self, partition: Tensor) -> dict[str, Tensor]:
        """Whole tensors by name from every rank's `partition`; collective over `group`."""
        flat = partition.new_empty(partition.numel() * dist.get_world_size(self.group))
        dist.all_gather_single(flat, partition, group=self.group)
        sizes = [math.prod(shape) for shape in self.shapes]
        pieces = flat[: sum(sizes)].split(sizes)
        return {
            name: piece.view(shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def fragments(self, num_elements: int) -> tuple[FlatFragment, ...]:
        """What lies where in this rank's partition of `num_elements` elements."""
        return tuple(
            cut_fragments(self.names, self.shapes, dist.get_rank(self.group) * num_elements, num_elements)
        )


def cut_fragments(
    names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], first: int, num_elements: int
) -> Iterator[FlatFragment]:
    """What elements first .. first+num_elements-1 hold of parameters laid out end to end; none is empty."""
    position = 0
    for name, shape in zip(names, shapes, strict=True):
        size = math.prod(shape)
        start, stop = max(first - position, 0), min(first + num_elements - position, size)
        if start < stop:
            yield FlatFragment(name, shape, start, stop, position + start - first)
        position += size
