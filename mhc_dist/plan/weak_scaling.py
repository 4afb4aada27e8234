"""Weak scaling: simulated steps of ever more devices with the same work each, and what planning them costs.

*deeper*: every pipeline rank more brings its own layers and microbatches, so that each rank keeps as much of
the model and as many tokens; eight data ranks, everything recomputed. *wider*: the run's own model on a fixed
pipeline, nothing recomputed, and more data ranks. Imports no torch.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from time import process_time
from typing import Any

from mhc_dist.config import RunConfig
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.place import place_and_simulate
from mhc_dist.pipeline.placement import Placement
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.collector import collector_paused
from mhc_dist.plan.costs import CostModel, plain_residual
from mhc_dist.plan.evaluate import evaluate
from mhc_dist.plan.layout import Layout, cached_schedule, model_ranks, planned_shapes
from mhc_dist.plan.machine import Machine

SCHEDULE = "dualpipev"
LAYERS_PER_RANK = 4
MICROBATCHES_PER_RANK = 4
GROUP = 8
"""Data ranks of the deeper series, and ranks of an expert group in both: a node."""

WIDE_PIPELINE = 8
MOST_DEVICES = 4096
DEEPEST = 16
"""Pipeline ranks up to which the deeper series deepens; then it widens, too."""


@dataclass(frozen=True)
class Point:
    """One size of a series."""

    series: str
    pipeline: int
    data: int
    num_microbatches: int
    num_layers: int | None = None
    """None: the run's own."""

    @property
    def devices(self) -> int:
        return self.pipeline * self.data

    def config(self, config: RunConfig) -> RunConfig:
        """`config` with the point's layers."""
        if self.num_layers is None:
            return config
        model = config.model.model_copy(update={"num_layers": self.num_layers})
        return config.model_copy(update={"model": model})

    @property
    def layout(self) -> Layout:
        return Layout(
            SCHEDULE,
            self.pipeline,
            GROUP,
            self.data,
            self.num_microbatches,
            recompute_everything=self.num_layers is not None,
            sequences=1,
        )


def deeper(pipeline: int, data: int = GROUP) -> Point:
    """A point of the deeper series."""
    return Point(
        "deeper", pipeline, data, MICROBATCHES_PER_RANK * pipeline, num_layers=LAYERS_PER_RANK * pipeline
    )


def series() -> Iterator[Point]:
    """Both series, from the smallest to 4096 devices, doubling."""
    pipeline, data = 1, GROUP
    while pipeline * data <= MOST_DEVICES:
        yield deeper(pipeline, data)
        pipeline, data = (2 * pipeline, data) if pipeline < DEEPEST else (pipeline, 2 * data)
    data = GROUP
    while WIDE_PIPELINE * data <= MOST_DEVICES:
        yield Point("wider", WIDE_PIPELINE, data, MICROBATCHES_PER_RANK * WIDE_PIPELINE)
        data *= 2


def step_figures(config: RunConfig, machine: Machine, point: Point) -> dict[str, Any]:
    """The simulated step of one point, and of the plain residual in the same layout."""
    own = point.config(config)
    ours = evaluate(own, machine, point.layout)
    plain = evaluate(plain_residual(own), machine, point.layout)
    summary = ours.summary
    ring = 2 * (point.data - 1) * machine.cluster.network_link.latency_seconds.value
    return {
        "series": point.series,
        "devices": point.devices,
        "pipeline": point.pipeline,
        "data": point.data,
        "expert": GROUP,
        "num_microbatches": point.num_microbatches,
        "num_layers": own.model.num_layers,
        "sequences_per_step": point.data * point.num_microbatches,
        "step_seconds": ours.step_seconds,
        "tokens_per_second_per_device": ours.tokens_per_second / point.devices,
        "model_flops_utilization": ours.model_flops_utilization,
        "bubble_ratio": summary.bubble_ratio,
        "exposed_all_to_all_ratio": summary.exposed_all_to_all_ratio,
        "exposed_p2p_ratio": summary.exposed_p2p_ratio,
        "reduce_seconds": ours.reduce_seconds,
        "ring_latency_seconds": ring,
        "peak_memory_bytes": ours.peak_bytes,
        "fits": ours.peak_bytes <= machine.memory_budget,
        "overhead_ratio_same_layout": ours.step_seconds / plain.step_seconds - 1.0,
    }


def making_figures(config: RunConfig, machine: Machine, point: Point) -> dict[str, Any]:
    """Processor seconds and memory of making one point's program. Call it in a fresh process: the memory is
    the most that the process has ever held, beyond what it holds now.
    """
    config = point.config(config)
    layout = point.layout
    seconds: dict[str, float] = {}
    before = _most_bytes()

    def lap(name: str, start: float) -> float:
        now = process_time()
        seconds[name] = now - start
        return now

    at = process_time()
    schedule = cached_schedule(layout.schedule, layout.pipeline, layout.num_microbatches)
    shapes = planned_shapes(config, model_ranks(schedule), layout)
    costs = CostModel(config, machine).table(layout, shapes, schedule.chunk_rank)
    at = lap("schedule", at)
    lowered = lower(schedule, shapes.chunks)
    at = lap("lower", at)
    validate(lowered)
    at = lap("validate", at)
    Simulation(lowered, costs)
    at = lap("simulate", at)
    lowered_bytes = _most_bytes() - before
    del lowered
    gc.collect()
    placement = Placement(memory_budget=machine.memory_budget)
    at = process_time()
    with collector_paused():
        program, _ = place_and_simulate(schedule, shapes.chunks, costs, placement)
    lap("place", at)
    peak_bytes = _most_bytes() - before
    at = process_time()
    place_and_simulate(schedule, shapes.chunks, costs, placement)
    lap("place_with_collector", at)
    return {
        "pipeline": point.pipeline,
        "num_microbatches": point.num_microbatches,
        "devices": point.devices,
        "actions": sum(map(len, program.actions)),
        "seconds": seconds,
        "lowered_bytes": lowered_bytes,
        "peak_bytes": peak_bytes,
    }


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
