"""The run's chunks as other engines get them: whole chunks under autograd, the head apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mhc_kernels.seam import make_backend
from torch import Tensor, nn

from mhc_dist.bench.cell import Cell, with_recompute
from mhc_dist.bench.pace import Pace
from mhc_dist.bench.peers.differentiable import DifferentiableChunk
from mhc_dist.bench.peers.engines import own_places
from mhc_dist.bench.routing import spread_evenly
from mhc_dist.model.language_model import Head
from mhc_dist.parallel.chunk import ModelChunk


def own_chunks(cell: Cell, pace: Pace, *, hide_shared: bool) -> dict[int, DifferentiableChunk]:
    """This rank's two chunks, by index."""
    config = with_recompute(cell.config, "none")
    backend = make_backend(config.kernels.backend)
    chunks = {}
    for place in own_places(cell):
        # Engines compute the loss by themselves, so the last chunk ends with its streams, before the head.
        headless = replace(place, is_last=False)
        chunk = ModelChunk(config, headless, backend, cell.exchange, cell.topology.expert_rank)
        head = Head(config) if place.is_last else None
        chunks[place.index] = DifferentiableChunk(chunk, head, pace, hide_shared=hide_shared)
        chunks[place.index].initialize(config)
        if cell.routing == "even":
            spread_evenly(chunks[place.index])
    return chunks


def named_gradients(chunks: Iterable[DifferentiableChunk]) -> dict[str, Tensor]:
    """Gradients under the names that parameters have in the whole model."""
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        named |= dict(chunk.chunk.named_parameters())
        if chunk.head is not None:
            named |= dict(chunk.head.named_parameters(prefix="head"))
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
