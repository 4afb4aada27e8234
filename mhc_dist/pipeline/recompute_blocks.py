"""Marks which phases of a chunk drop what they can regenerate, in blocks. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhc_dist.pipeline.action import ChunkShape, PhaseShape


def with_recompute(shape: ChunkShape, blocks: Sequence[Sequence[str]]) -> ChunkShape:
    """`shape` in which the phases of each block drop, and are recomputed in order from the block's start.

    blocks: phase names in forward order; a phase is in at most one block. Recomputing a phase starts from
    what the phase before it in its block regenerated; the first starts from what is kept.
    """
    after: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        for position, name in enumerate(block):
            if name in after:
                raise ValueError(f"phase {name} is in two recompute blocks.")
            after[name] = tuple(block[position - 1 : position]) if position else ()
    unknown = after.keys() - {phase.name for phase in shape.phases}
    if unknown:
        raise ValueError(
            f"recompute blocks name {', '.join(sorted(unknown))}, which the chunk does not have."
        )
    return ChunkShape(
        tuple(
            replace(item, drops=True, recompute_after=after[item.name])
            if isinstance(item, PhaseShape) and item.name in after
            else item
            for item in shape.items
        )
    )
