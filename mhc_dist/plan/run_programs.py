"""The programs of a run, from its configuration alone. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from mhc_dist.config import RunConfig
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.lower import lower, lower_evaluation
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.collector import collector_paused
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import placed_program


class RunPrograms(NamedTuple):
    """What all ranks do in one training step and in one evaluation of as many microbatches."""

    places: tuple[ChunkPlace, ...]
    training: Program
    evaluation: Program

    def places_of(self, pipeline_rank: int) -> tuple[ChunkPlace, ...]:
        """The chunks that a pipeline rank holds."""
        return tuple(place for place in self.places if self.training.chunk_rank[place.index] == pipeline_rank)


def plan_run(config: RunConfig) -> RunPrograms:
    """Schedule, lower (or place by the costs of `schedule.cluster`) and validate.

    Raises ValueError for what a schedule cannot do and for a cluster file that cannot be read.
    """
    schedule = schedule_of(config)
    shapes = own_shapes(config)
    with collector_paused():
        if config.schedule.cluster is None:
            training = lower(schedule, shapes.chunks)
            validate(training)
        else:
            training = placed_program(config, Machine(load_cluster(config.schedule.cluster)))
        evaluation = lower_evaluation(schedule.chunk_rank, shapes.chunks, config.schedule.num_microbatches)
        validate(evaluation)
    return RunPrograms(shapes.places, training, evaluation)
