"""Small chunk dataflows that tests of schedules share."""

from __future__ import annotations

from mhc_dist.pipeline.action import ChunkShape, ExchangeShape, ItemShape, PhaseShape
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule


def dense_chunk() -> ChunkShape:
    """One phase, nothing to exchange."""
    return ChunkShape((PhaseShape("body", ("input",), ("output",)),))


def experts_chunk(num_layers: int = 1) -> ChunkShape:
    """Layers with an expert exchange each: counts, dispatch, combine; shared experts beside the dispatch."""
    items: list[ItemShape] = []
    streams = "input"
    for i in range(num_layers):
        output = "output" if i == num_layers - 1 else f"streams{i}"
        items += [
            PhaseShape(f"attention{i}", (streams,), (f"residual{i}", f"tokens{i}", f"counts{i}")),
            ExchangeShape(f"count{i}", (f"counts{i}",), (f"plan{i}",), differentiable=False),
            ExchangeShape(f"dispatch{i}", (f"tokens{i}", f"plan{i}"), (f"received{i}",)),
            PhaseShape(f"shared{i}", (f"residual{i}",), (f"shared_out{i}",)),
            PhaseShape(f"experts{i}", (f"received{i}", f"plan{i}"), (f"expert_out{i}",)),
            ExchangeShape(f"combine{i}", (f"expert_out{i}", f"plan{i}"), (f"returned{i}",)),
            PhaseShape(
                f"merge{i}",
                (f"residual{i}", f"shared_out{i}", f"returned{i}"),
                (output,),
                has_weights=False,
            ),
        ]
        streams = output
    return ChunkShape(tuple(items))


def chunks_for(schedule: CoarseSchedule, chunk: ChunkShape) -> tuple[ChunkShape, ...]:
    return (chunk,) * len(schedule.chunk_rank)
