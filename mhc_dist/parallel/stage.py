"""What one process holds of the model: the chunks of its pipeline rank, with its share of the experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from mhc_kernels.seam import SeamBackend
from torch import nn

from mhc_dist.config import RunConfig
from mhc_dist.model.initialize import initialize
from mhc_dist.model.moe import Router
from mhc_dist.parallel.chunk import ModelChunk
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.pipeline.streams import Streams


class Stage(nn.Module):
    """The chunks of one pipeline rank, initialised from the run's seed."""

    def __init__(
        self,
        config: RunConfig,
        places: Sequence[ChunkPlace],
        backend: SeamBackend,
        exchange: ExpertExchange,
        expert_rank: int,
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        super().__init__()
        self.by_index: dict[int, ModelChunk] = {}
        for place in places:
            chunk = ModelChunk(config, place, backend, exchange, expert_rank, streams)
            initialize(chunk, config)
            self.add_module(f"chunk{place.index}", chunk)
            self.by_index[place.index] = chunk
        self.to(device)

    def logical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names they have in the whole model, whatever the topology."""
        for chunk in self.by_index.values():
            yield from chunk.named_parameters()

    def routers(self) -> Iterator[tuple[str, Router]]:
        """The routers held here, by logical name."""
        for chunk in self.by_index.values():
            for name, module in chunk.named_modules():
                if isinstance(module, Router):
                    yield name, module


def logical_name(stage_name: str) -> str:
    """`chunk3.layers.5.attention.query.weight` -> `layers.5.attention.query.weight`."""
    return stage_name.partition(".")[2]
