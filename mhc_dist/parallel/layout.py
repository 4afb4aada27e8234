"""Which layers every chunk of a run holds, and what the chunks look like to a schedule. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mhc_dist.config import RunConfig
from mhc_dist.parallel.partition import partition
from mhc_dist.parallel.recompute import apply_recompute
from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    ChunkShape,
    ExchangeShape,
    ItemShape,
    PhaseShape,
)


@dataclass(frozen=True)
class ChunkPlace:
    """Which part of the model a chunk is: layers first..last-1, and whether it starts or ends the model."""

    index: int
    first_layer: int
    last_layer: int
    is_first: bool
    is_last: bool


def chunk_places(config: RunConfig, chunk_rank: Sequence[int]) -> tuple[ChunkPlace, ...]:
    """The chunks of a run in model order; chunk c is on pipeline rank `chunk_rank[c]`."""
    return places_between(partition(config, chunk_rank))


def places_between(bounds: Sequence[int]) -> tuple[ChunkPlace, ...]:
    """Chunk i holds layers bounds[i] .. bounds[i+1]-1."""
    last = len(bounds) - 2
    return tuple(
        ChunkPlace(index, first, end, index == 0, index == last)
        for index, (first, end) in enumerate(pairwise(bounds))
    )


def expert_layers(config: RunConfig, place: ChunkPlace) -> list[int]:
    """The layers of a chunk that exchange tokens."""
    return [k for k in range(place.first_layer, place.last_layer) if k >= config.model.num_dense_layers]


def chunk_shape(config: RunConfig, place: ChunkPlace) -> ChunkShape:
    """The dataflow of a chunk. `parallel/chunk.py` describes the items and runs them."""
    items: list[ItemShape] = []
    mix = ("post", "res", "pre") if config.residual.shifted_pre else ("post", "res")
    carried: tuple[str, ...] = (CHUNK_INPUT,)
    for k in expert_layers(config, place):
        written = tuple(
            f"{name}.{k}" for name in ("streams", *mix, "hidden", "weights", "rows", "plan", "sent")
        )
        items.append(PhaseShape(f"attention.{k}", carried, written))
        items.append(ExchangeShape(f"counts.{k}", (f"sent.{k}",), (f"arrival.{k}",), differentiable=False))
        items.append(ExchangeShape(f"dispatch.{k}", (f"rows.{k}", f"arrival.{k}"), (f"arrived.{k}",)))
        if config.model.num_shared_experts:
            items.append(PhaseShape(f"shared.{k}", (f"hidden.{k}",), (f"shared.{k}",)))
        items.append(PhaseShape(f"experts.{k}", (f"arrived.{k}", f"arrival.{k}"), (f"answers.{k}",)))
        items.append(ExchangeShape(f"combine.{k}", (f"answers.{k}", f"arrival.{k}"), (f"returned.{k}",)))
        carried = tuple(f"{name}.{k}" for name in ("streams", *mix, "weights", "plan", "returned"))
        if config.model.num_shared_experts:
            carried += (f"shared.{k}",)
    reads = (*carried, CHUNK_TARGETS) if place.is_last else carried
    # After the last experts only the head has matrices; a chunk without experts runs all its layers here.
    has_weights = place.is_last or not expert_layers(config, place)
    items.append(PhaseShape("finish", reads, (CHUNK_OUTPUT,), has_weights=has_weights))
    num_sublayers = 2 * (place.last_layer - place.first_layer)
    return apply_recompute(config, ChunkShape(tuple(items)), num_sublayers)
