"""The programs of a run, from its configuration alone. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from mhc_dist.config import RunConfig
from mhc_dist.parallel.layout import ChunkPlace, chunk_places, chunk_shape
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.lower import lower, lower_evaluation
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.validate import validate


class RunPrograms(NamedTuple):
    """What all ranks do in one training step and in one evaluation of as many microbatches."""

    places: tuple[ChunkPlace, ...]
    training: Program
    evaluation: Program

    def places_of(self, pipeline_rank: int) -> tuple[ChunkPlace, ...]:
        """The chunks that a pipeline rank holds."""
        return tuple(place for place in self.places if self.training.chunk_rank[place.index] == pipeline_rank)


def plan_run(config: RunConfig) -> RunPrograms:
    """Schedule, lower and validate. Raises ValueError for what a schedule cannot do."""
    num_microbatches = config.schedule.num_microbatches
    schedule = make_schedule(config.schedule.name, config.parallel.pipeline, num_microbatches)
    places = chunk_places(config, len(schedule.chunk_rank))
    shapes = tuple(chunk_shape(config, place) for place in places)
    training = lower(schedule, shapes)
    evaluation = lower_evaluation(schedule.chunk_rank, shapes, num_microbatches)
    validate(training)
    validate(evaluation)
    return RunPrograms(places, training, evaluation)
