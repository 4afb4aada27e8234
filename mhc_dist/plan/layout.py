"""One way to spread a run over a cluster, and the program shapes it leads to. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import RecomputeConfig, ResidualConfig, ResidualKind
from mhc_dist.parallel.layout import ChunkPlace, chunk_places, chunk_shape, places_between
from mhc_dist.parallel.recompute import drop_everything, drop_streams
from mhc_dist.pipeline.action import ChunkShape
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.registry import make_schedule


@dataclass(frozen=True, slots=True)
class Layout:
    """recompute_block: sublayers per block whose streams are regenerated; None keeps them.
    recompute_everything: phases keep their inputs only, and run again before their backward.
    boundaries: first layer of every chunk, then the number of layers; None cuts as the run itself does.
    sequences: per microbatch; None is the run's own number.
    """

    schedule: str
    pipeline: int
    expert: int
    data: int
    num_microbatches: int
    recompute_block: int | None = None
    recompute_everything: bool = False
    boundaries: tuple[int, ...] | None = None
    sequences: int | None = None

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
        size = "" if self.sequences is None else f" of {self.sequences}"
        return (
            f"{self.schedule} pipeline={self.pipeline} data={self.data} expert={self.expert}"
            f" microbatches={self.num_microbatches}{size}, {block}"
        )

    def settings(self, config: RunConfig) -> list[str]:
        """What turns `config` into a run of this layout: arguments of `--set`."""
        blocks = {True: ("full", "auto"), False: ("none", "auto")}[self.recompute_everything]
        if self.recompute_block is not None:
            blocks = ("mhc", str(self.recompute_block))
        settings = [
            f"schedule.name={self.schedule}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.data={self.data}",
            f"parallel.expert={self.expert}",
            f"schedule.num_microbatches={self.num_microbatches}",
            f"data.sequences_per_microbatch={self.sequences or config.data.sequences_per_microbatch}",
            f"recompute.mode={blocks[0]}",
            f"recompute.block={blocks[1]}",
        ]
        if self.boundaries is not None:
            settings.append(f"schedule.boundaries=[{','.join(map(str, self.boundaries[1:-1]))}]")
        return settings


def same_layout(layout: Layout) -> Layout:
    """The layout without recomputation."""
    return replace(layout, recompute_block=None, recompute_everything=False)


def sized(config: RunConfig, layout: Layout) -> RunConfig:
    """`config` with the layout's microbatches."""
    if layout.sequences is None or layout.sequences == config.data.sequences_per_microbatch:
        return config
    data = config.data.model_copy(update={"sequences_per_microbatch": layout.sequences})
    return config.model_copy(update={"data": data})


def regenerates_streams(residual: ResidualConfig) -> bool:
    """Whether blocks of sublayers can drop their streams: `recompute.mode` mhc."""
    return residual.kind not in (ResidualKind.RESIDUAL, ResidualKind.HC)


@dataclass(frozen=True)
class Shapes:
    """Chunks of a layout: where they lie in the model, and their dataflow."""

    places: tuple[ChunkPlace, ...]
    chunks: tuple[ChunkShape, ...]


def planned_shapes(config: RunConfig, chunk_rank: Sequence[int], layout: Layout) -> Shapes:
    """The run's chunks with the boundaries of `layout` and what it recomputes, whatever the run's own
    recompute section says.
    """
    places = (
        chunk_places(config, chunk_rank) if layout.boundaries is None else places_between(layout.boundaries)
    )
    kept = config.model_copy(update={"recompute": RecomputeConfig(mode="none")})
    chunks = []
    for place in places:
        shape = chunk_shape(kept, place)
        if layout.recompute_everything:
            shape = drop_everything(shape)
        elif layout.recompute_block is not None and regenerates_streams(config.residual):
            shape = drop_streams(shape, layout.recompute_block)
        chunks.append(shape)
    return Shapes(places, tuple(chunks))


def own_shapes(config: RunConfig) -> Shapes:
    """The run's chunks exactly as its configuration has them: what the executor runs."""
    places = chunk_places(config, model_ranks(schedule_of(config)))
    return Shapes(places, tuple(chunk_shape(config, place) for place in places))


def schedule_of(config: RunConfig) -> CoarseSchedule:
    """The run's own schedule."""
    return cached_schedule(config.schedule.name, config.parallel.pipeline, config.schedule.num_microbatches)


def model_ranks(schedule: CoarseSchedule) -> tuple[int, ...]:
    """The rank of every chunk of the (first copy of the) model."""
    return schedule.chunk_rank[: len(schedule.chunk_rank) // schedule.num_copies]


@lru_cache(maxsize=512)
def cached_schedule(name: str, num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    return make_schedule(name, num_ranks, num_microbatches)
