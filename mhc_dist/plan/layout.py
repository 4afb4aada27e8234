"""One way to spread a run over a cluster, and the program shapes it leads to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import RecomputeConfig, ResidualKind
from mhc_dist.model.flops import head_flops_per_token, layer_flops_per_token
from mhc_dist.parallel.layout import ChunkPlace, chunk_places, chunk_shape
from mhc_dist.parallel.partition import partition
from mhc_dist.parallel.recompute import drop_everything, drop_streams
from mhc_dist.pipeline.action import ChunkShape
from mhc_dist.pipeline.balance import balance_ranks


@dataclass(frozen=True, slots=True)
class Layout:
    """recompute_block: sublayers per block whose streams are regenerated; None keeps them.
    recompute_everything: phases keep their inputs only, and run again before their backward.
    boundaries: first layer of every chunk, then the number of layers; None cuts as the run itself does.
    """

    schedule: str
    pipeline: int
    expert: int
    data: int
    num_microbatches: int
    recompute_block: int | None = None
    recompute_everything: bool = False
    boundaries: tuple[int, ...] | None = None

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.data

    @property
    def recompute_text(self) -> str:
        """`-` for nothing, a block length, or `full`."""
        if self.recompute_everything:
            return "full"
        return "-" if self.recompute_block is None else str(self.recompute_block)

    def __str__(self) -> str:
        block = {"-": "no recompute", "full": "full recompute"}.get(
            self.recompute_text, f"recompute in blocks of {self.recompute_text}"
        )
        return (
            f"{self.schedule} pipeline={self.pipeline} data={self.data} expert={self.expert}"
            f" microbatches={self.num_microbatches}, {block}"
        )


@dataclass(frozen=True)
class Shapes:
    """Chunks of a layout: where they lie in the model, and their dataflow."""

    places: tuple[ChunkPlace, ...]
    chunks: tuple[ChunkShape, ...]


def planned_shapes(config: RunConfig, num_chunks: int, layout: Layout) -> Shapes:
    """The run's chunks with what `layout` recomputes, whatever the run's own recompute section says."""
    places = chunk_places(config, num_chunks)
    if layout.boundaries is not None:
        places = tuple(
            replace(place, first_layer=first, last_layer=last)
            for place, (first, last) in zip(places, pairwise(layout.boundaries), strict=True)
        )
    kept = config.model_copy(update={"recompute": RecomputeConfig(mode="none")})
    chunks = []
    for place in places:
        shape = chunk_shape(kept, place)
        if layout.recompute_everything:
            shape = drop_everything(shape)
        elif layout.recompute_block is not None and config.residual.kind is not ResidualKind.RESIDUAL:
            shape = drop_streams(shape, layout.recompute_block)
        chunks.append(shape)
    return Shapes(places, tuple(chunks))


def balanced_boundaries(config: RunConfig, chunk_rank: tuple[int, ...]) -> tuple[int, ...]:
    """Cuts that give every rank, not only every chunk, its share of the forward operations."""
    num_layers = config.model.num_layers
    return tuple(
        balance_ranks(
            [float(layer_flops_per_token(config, layer)) for layer in range(num_layers)],
            chunk_rank,
            partition(config, len(chunk_rank)),
            last_extra=float(head_flops_per_token(config)),
        )
    )


def own_shapes(config: RunConfig, num_chunks: int) -> Shapes:
    """The run's chunks exactly as its configuration has them: what the executor runs."""
    places = chunk_places(config, num_chunks)
    return Shapes(places, tuple(chunk_shape(config, place) for place in places))
