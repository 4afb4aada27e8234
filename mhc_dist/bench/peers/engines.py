"""What all engines of the comparison have in common."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mhc_dist.bench.cell import Cell
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.plan.layout import own_shapes


class Engine(Protocol):
    """One way to run forward and backward of a step. Weights are those of the run's seed."""

    def step(self) -> list[Tensor]:
        """All forwards and backwards; gradients of the mean loss are left in the parameters.

        Returns the microbatches' losses on the rank that computes them, else an empty list.
        """
        ...

    def gradients(self) -> dict[str, Tensor]:
        """By the parameters' names in the whole model."""
        ...

    def forget_gradients(self) -> None: ...


def own_places(cell: Cell) -> tuple[ChunkPlace, ChunkPlace]:
    """The two chunks of this rank in a V."""
    places = own_shapes(cell.config).places
    first = cell.topology.pipeline_rank
    return places[first], places[-1 - first]


def streams_shape(cell: Cell) -> tuple[int, int, int]:
    """(T, n, C) of one microbatch."""
    data, model = cell.config.data, cell.config.model
    num_tokens = data.sequences_per_microbatch * data.sequence_length
    return num_tokens, cell.config.residual.num_streams, model.hidden_size
