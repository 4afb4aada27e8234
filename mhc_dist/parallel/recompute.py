"""Which phases of a chunk drop what, as the configuration asks. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import ChunkShape, PhaseShape
from mhc_dist.pipeline.recompute_blocks import with_recompute


def apply_recompute(config: RunConfig, shape: ChunkShape, num_sublayers: int) -> ChunkShape:
    """`shape` with the phases marked that drop under `recompute.mode`; block length by config or formula.

    num_sublayers: of the chunk.
    """
    match config.recompute.mode:
        case "none":
            return shape
        case "mhc":
            block = config.recompute.block
            if block == "auto":
                block = best_block(num_sublayers, config.residual.num_streams)
            return drop_streams(shape, block)
        case "full":
            return drop_everything(shape)


def best_block(num_sublayers: int, num_streams: int) -> int:
    """Sublayers per block that keep least: argmin of n ceil(L / b) + (n + 2) b (mHC paper, 4.3.2)."""
    n = num_streams

    def rows(block: int) -> int:
        return n * -(-num_sublayers // block) + (n + 2) * block

    around = sqrt(n * num_sublayers / (n + 2))
    return min(range(1, max(2, int(2 * around) + 2)), key=lambda block: (rows(block), block))


def phase_blocks(shape: ChunkShape, sublayers: int) -> list[list[str]]:
    """Phases that cross connections, in blocks of about `sublayers`: an expert layer's phase crosses two."""
    names = [phase.name for phase in shape.phases if phase.name.startswith("attention.")]
    length = max(1, sublayers // 2)
    return [names[first : first + length] for first in range(0, len(names), length)]


def drop_streams(shape: ChunkShape, sublayers: int) -> ChunkShape:
    """Selective recompute: streams and sublayer inputs go, in blocks.

    Phases that only read what an `attention.k` made, and save it for their backward, depend on its RECOMPUTE:
    `shared.k` on its last sublayer input, `finish` on its last streams.
    """
    marked = with_recompute(shape, phase_blocks(shape, sublayers))
    items = []
    attention = ""
    for item in marked.items:
        if isinstance(item, PhaseShape):
            if item.name.startswith("attention."):
                attention = item.name
            elif attention and (item.name.startswith("shared.") or item.name == "finish"):
                item = replace(item, drops=True, recompute_after=(attention,))
        items.append(item)
    return ChunkShape(tuple(items))


def drop_everything(shape: ChunkShape) -> ChunkShape:
    """Full recompute: every phase keeps its inputs only and runs once more before its backward."""
    return ChunkShape(
        tuple(replace(item, drops=True) if isinstance(item, PhaseShape) else item for item in shape.items)
    )
