"""One way to spread a run over a cluster, and the program shapes it leads to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from mhc_dist.config import ResidualKind, RunConfig
from mhc_dist.parallel.layout import ChunkPlace, chunk_places, chunk_shape
from mhc_dist.pipeline.action import ChunkShape
from mhc_dist.pipeline.recompute_blocks import with_recompute


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
    chunks = []
    for place in places:
        shape = chunk_shape(config, place)
        if recompute_block is not None and config.residual.kind is not ResidualKind.RESIDUAL:
            shape = with_recompute(shape, phase_blocks(shape, recompute_block))
        chunks.append(shape)
    return Shapes(places, tuple(chunks))


def phase_blocks(shape: ChunkShape, sublayers: int) -> list[list[str]]:
    """Phases that cross connections, in blocks of about `sublayers`: an expert layer's phase crosses two."""
    names = [phase.name for phase in shape.phases if phase.name.startswith("attention.")]
    length = max(1, sublayers // 2)
    return [names[first : first + length] for first in range(0, len(names), length)]


def best_block(num_sublayers: int, num_streams: int) -> int:
    """Sublayers per block that keep least: argmin of n ceil(L / b) + (n + 2) b (mHC paper, 4.3.2)."""
    n = num_streams

    def rows(block: int) -> int:
        return n * -(-num_sublayers // block) + (n + 2) * block

    around = sqrt(n * num_sublayers / (n + 2))
    return min(range(1, max(2, int(2 * around) + 2)), key=lambda block: (rows(block), block))
