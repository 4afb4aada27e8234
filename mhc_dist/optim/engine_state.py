"""The optimizer's state under the parameters' names, and its way out of and into flat partitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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
    """All that the optimizer of this rank's parameters needs to continue: for tests and checkpoints.

    `num_steps` counts `finish_step` calls and drives the learning rate; `num_updates` counts those that were
    applied and drives Adam's bias correction.
    """

    num_steps: int
    num_updates: int
    parameters: dict[str, ParameterState]

    def check_shapes(self, expected: dict[str, tuple[int, ...]], rank: int) -> None:
        """Raise ValueError when names or shapes are not the `expected` ones of this rank's parameters."""
        given = {name: tuple(entry.master.shape) for name, entry in self.parameters.items()}
        differing = sorted(name for name in expected | given if expected.get(name) != given.get(name))
        if differing:
            raise ValueError(
                f"rank {rank}: {len(differing)} of {len(expected)} parameters are missing, unknown or of"
                f" another shape in the given state, first {differing[0]}: expected"
                f" {expected.get(differing[0])}, given {given.get(differing[0])}. Use the model it came from."
            )


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

    def scatter(self, whole: dict[str, Tensor], partition: Tensor) -> None:
        """Fill this rank's `partition` (fp32) from whole tensors by name; every rank has them all."""
        flat = partition.new_zeros(partition.numel() * dist.get_world_size(self.group))
        pieces = torch.cat([whole[name].reshape(-1).to(flat.device, flat.dtype) for name in self.names])
        flat[: pieces.numel()] = pieces
        rank = dist.get_rank(self.group)
        partition.copy_(flat[rank * partition.numel() : (rank + 1) * partition.numel()])
