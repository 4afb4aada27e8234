"""One way to spread a run over a cluster, and the program shapes it leads to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RecomputeConfig, ResidualKind, RunConfig
from mhc_dist.parallel.layout import ChunkPlace, chunk_places, chunk_shape
from mhc_dist.parallel.recompute import drop_streams
from mhc_dist.pipeline.action import ChunkShape


@dataclass(frozen=True, slots=True)
class Layout:
    """recompute_block: sublayers per block whose streams are regenerated; None keeps everything."""

    schedule: str
    pipeline: int
    expert: int
    data: int
    num_microbatches: int
    recompute_block: int | None = None

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.data

    def __str__(self) -> str:
        block = "no recompute" if self.recompute_block is None else f"block {self.recompute_block}"
        return (
            f"{self.schedule} pipeline={self.pipeline} data={self.data} expert={self.expert}"
            f" microbatches={self.num_microbatches}, {block}"
        )


@dataclass(frozen=True)
class Shapes:
    """Chunks of a layout: where they lie in the model, and their dataflow."""

    places: tuple[ChunkPlace, ...]
    chunks: tuple[ChunkShape, ...]


def chunk_shapes(config: RunConfig, num_chunks: int, recompute_block: int | None) -> Shapes:
    """The run's chunks; phases that cross connections drop and regenerate in blocks, if asked to."""
    places = chunk_places(config, num_chunks)
    kept = config.model_copy(update={"recompute": RecomputeConfig(mode="none")})
    chunks = []
    for place in places:
        # The plan chooses the block, whatever the run's own recompute section says.
        shape = chunk_shape(kept, place)
        if recompute_block is not None and config.residual.kind is not ResidualKind.RESIDUAL:
            shape = drop_streams(shape, recompute_block)
        chunks.append(shape)
    return Shapes(places, tuple(chunks))
