"""What all engines of the comparison have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from mhc_kernels.seam import SeamBackend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.pipeline.executor import Microbatch
from mhc_dist.topology import Topology


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


@dataclass(frozen=True)
class Setting:
    """Where and with what an engine runs."""

    config: RunConfig
    places: tuple[ChunkPlace, ...]
    topology: Topology
    groups: ProcessGroups
    exchange: ExpertExchange
    backend: SeamBackend
    microbatches: list[Microbatch]

    @property
    def chunk_indices(self) -> tuple[int, int]:
        """The two chunks of this rank in a V."""
        first = self.topology.pipeline_rank
        return first, self.num_chunks - 1 - first

    @property
    def num_chunks(self) -> int:
        return len(self.places)

    @property
    def streams_shape(self) -> tuple[int, int, int]:
        data, model = self.config.data, self.config.model
        num_tokens = data.sequences_per_microbatch * data.sequence_length
        return num_tokens, self.config.residual.num_streams, model.hidden_size


CPU = torch.device("cpu")
