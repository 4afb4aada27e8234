"""The run's chunks as other engines get them: whole chunks under autograd, the head apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn

from mhc_dist.bench.pace import Pace
from mhc_dist.bench.peers.differentiable import DifferentiableChunk
from mhc_dist.bench.peers.engines import Setting
from mhc_dist.config_sections import RecomputeConfig
from mhc_dist.model.language_model import Head
from mhc_dist.parallel.chunk import ModelChunk


def own_chunks(setting: Setting, pace: Pace, *, hide_shared: bool) -> dict[int, DifferentiableChunk]:
    """This rank's two chunks, by index."""
    config = setting.config.model_copy(update={"recompute": RecomputeConfig(mode="none")})
    chunks = {}
    for index in setting.chunk_indices:
        # Engines compute the loss by themselves, so the last chunk ends with its streams, before the head.
        place = replace(setting.places[index], is_last=False)
        chunk = ModelChunk(config, place, setting.backend, setting.exchange, setting.topology.expert_rank)
        head = Head(config) if setting.places[index].is_last else None
        chunks[index] = DifferentiableChunk(chunk, head, pace, hide_shared=hide_shared)
        chunks[index].initialize(config)
    return chunks


def named_parameters(chunks: Iterable[DifferentiableChunk]) -> dict[str, nn.Parameter]:
    """Parameters under the names they have in the whole model."""
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        named |= chunk.chunk.named_parameters()
        if chunk.head is not None:
            named |= chunk.head.named_parameters(prefix="head")
    return named


def named_gradients(chunks: Iterable[DifferentiableChunk]) -> dict[str, Tensor]:
    return {name: p.grad for name, p in named_parameters(chunks).items() if p.grad is not None}
