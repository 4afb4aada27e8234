"""Bytes a rank holds through the whole step. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RunConfig
from mhc_dist.model.count import count_parameters
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.plan.layout import Layout, Shapes

MAIN_GRADIENT_BYTES = 4
"""Gradients add up in fp32."""

OPTIMIZER_BYTES = 12
"""fp32 master weight and two Adam moments, sharded over the ranks that hold the parameter (ZeRO-1)."""


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters on one rank: replicated over all data ranks, and experts replicated over data / expert."""

    shared: float
    experts: float


def held_by_chunk(config: RunConfig, layout: Layout, place: ChunkPlace) -> Held:
    """Parameters of one chunk on one rank. Per-layer counts are the model's, divided by its layers."""
    m, count = config.model, count_parameters(config)
    num_expert_layers = m.num_layers - m.num_dense_layers
    layers = range(place.first_layer, place.last_layer)
    dense = sum(k < m.num_dense_layers for k in layers)
    sparse = len(layers) - dense
    shared = len(layers) * (count.attention + count.connections + count.norms) / m.num_layers
    if dense:
        shared += dense * count.dense_feed_forward / m.num_dense_layers
    experts = 0.0
    if sparse:
        shared += sparse * (count.router + count.shared_experts) / num_expert_layers
        experts = sparse * count.routed_experts / num_expert_layers / layout.expert
    shared += count.embedding if place.is_first else 0
    shared += count.output_head + count.stream_head if place.is_last else 0
    return Held(shared, experts)


def held_by_rank(
    config: RunConfig, layout: Layout, shapes: Shapes, chunk_rank: tuple[int, ...]
) -> list[Held]:
    """Sum over the chunks of each pipeline rank."""
    held = [Held(0.0, 0.0)] * layout.pipeline
    for place, rank in zip(shapes.places, chunk_rank, strict=True):
        chunk = held_by_chunk(config, layout, place)
        held[rank] = Held(held[rank].shared + chunk.shared, held[rank].experts + chunk.experts)
    return held


@dataclass(frozen=True, slots=True)
class StaticBytes:
    """What a rank holds through the whole step."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def static_by_rank(
    config: RunConfig, layout: Layout, shapes: Shapes, chunk_rank: tuple[int, ...]
) -> list[StaticBytes]:
    """Weights, fp32 main gradients and this rank's shard of the optimizer state."""
    weight = 2 if config.train.precision == "bf16" else 4
    replicas = layout.data / layout.expert
    return [
        StaticBytes(
            weights=round(weight * (held.shared + held.experts)),
            gradients=round(MAIN_GRADIENT_BYTES * (held.shared + held.experts)),
            optimizer=round(OPTIMIZER_BYTES * (held.shared / layout.data + held.experts / replicas)),
        )
        for held in held_by_rank(config, layout, shapes, chunk_rank)
    ]
