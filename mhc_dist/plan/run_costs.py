"""Costs, programs and calibration of a run exactly as its configuration lays it out. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.calibrate import calibrate
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.perfetto import read_events
from mhc_dist.pipeline.place import place_best
from mhc_dist.pipeline.placement import Placement
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.calibration import Calibration, compare
from mhc_dist.plan.costs import CostModel
from mhc_dist.plan.layout import Layout, own_shapes, schedule_of
from mhc_dist.plan.machine import Machine


def layout_of(config: RunConfig) -> Layout:
    """The layout that the configuration itself asks for."""
    parallel, schedule = config.parallel, config.schedule
    return Layout(
        schedule.name,
        parallel.pipeline,
        parallel.expert,
        parallel.data,
        schedule.num_microbatches,
        recompute_everything=config.recompute.mode == "full",
    )


def run_costs(config: RunConfig, machine: Machine) -> CostTable:
    """Predicted costs of the run's own chunks."""
    schedule = schedule_of(config)
    shapes = own_shapes(config)
    return CostModel(config, machine).table(layout_of(config), shapes, schedule.chunk_rank)


def placed_program(
    config: RunConfig, machine: Machine, placement: Placement | None = None, costs: CostTable | None = None
) -> Program:
    """The run's own program, its phases placed by `costs` (by default the predicted ones), and validated.

    By default placement may use as much memory as the planner allows it on this machine. Deterministic: every
    process that calls it with the same arguments gets the same program.
    """
    placement = placement or Placement(memory_budget=machine.memory_budget)
    schedule = schedule_of(config)
    shapes = own_shapes(config)
    program, _ = place_best(schedule, shapes.chunks, costs or run_costs(config, machine), placement)
    validate(program)
    return program


def calibration_from_trace(config: RunConfig, machine: Machine, trace: Path) -> Calibration:
    """Measured over predicted, from a trace of this very run (one data rank of every pipeline rank)."""
    if not trace.is_file():
        raise ValueError(f"no trace file {trace}.")
    predicted = run_costs(config, machine)
    return compare(predicted, calibrate(predicted, read_events(trace)))
