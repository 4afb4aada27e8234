"""One cell of the overhead table: a model on so many devices of a cluster, as data. Imports no torch."""

from __future__ import annotations

from typing import Any

from mhc_dist.config import RunConfig
from mhc_dist.plan.costs import plain_residual
from mhc_dist.plan.evaluate import Evaluation, evaluate
from mhc_dist.plan.layout import same_layout
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.overhead import Overhead, overhead
from mhc_dist.plan.report import plan_json
from mhc_dist.plan.search import PLANNED_SCHEDULES, NothingFitsError, possible_layouts, search
from mhc_dist.plan.without import Measure, without

MOST_BATCHES = 64
"""Largest multiple of the run's own batch that is tried, where so many devices cannot share it."""


def plan_cell(config: RunConfig, machine: Machine, num_devices: int) -> dict[str, Any]:
    """The best layout, what hyper-connections cost in it, and what it is without each measure.

    Devices that cannot share the run's batch equally get the smallest multiple of it that they can share:
    `batch_factor`. Where nothing fits, `outcome` says so and `missing_bytes` by how much.
    """
    factor, config = shared_batch(config, num_devices)
    cell: dict[str, Any] = {
        "devices": num_devices,
        "batch_factor": factor,
        "sequences_per_step": config.sequences_per_step,
        "memory_budget_bytes": machine.memory_budget,
    }
    try:
        found = search(config, machine, num_devices)
    except NothingFitsError as error:
        smallest = error.smallest
        return cell | {
            "outcome": "nothing_fits",
            "message": str(error),
            "smallest_layout": str(smallest.layout),
            "missing_bytes": smallest.peak_bytes - machine.memory_budget,
        }
    best = found.best[0]
    cost = overhead(config, machine, num_devices, best)
    cell |= {
        "outcome": "planned",
        "num_layouts": found.num_layouts,
        "num_fitting": found.num_fitting,
        "layout": str(best.layout),
        "plan": plan_json(config, found, cost),
        "plain": _short(cost.plain),
        "plain_in_same_layout": _short(cost.plain_in_same_layout),
        "without": {measure.value: _without(config, machine, best, cost, measure) for measure in Measure},
    }
    if best.layout != same_layout(best.layout):
        cell["best_keeping_everything"] = _keeping_everything(config, machine, num_devices, best)
    return cell


def shared_batch(config: RunConfig, num_devices: int) -> tuple[int, RunConfig]:
    """The smallest multiple of the run's batch that `num_devices` can share, and the run with it."""
    for factor in range(1, MOST_BATCHES + 1):
        schedule = config.schedule.model_copy(
            update={"num_microbatches": factor * config.schedule.num_microbatches}
        )
        larger = config.model_copy(update={"schedule": schedule})
        if any(possible_layouts(larger, num_devices, PLANNED_SCHEDULES, recompute=False)):
            return factor, larger
    raise ValueError(
        f"{num_devices} devices cannot share {config.sequences_per_step} sequences, nor any multiple up to"
        f" {MOST_BATCHES} times as many. Give a number of devices with small divisors, such as 8 or 64."
    )


def _short(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "layout": str(evaluation.layout),
        "step_seconds": evaluation.step_seconds,
        "peak_memory_bytes": evaluation.peak_bytes,
    }


def _without(
    config: RunConfig, machine: Machine, best: Evaluation, cost: Overhead, measure: Measure
) -> dict[str, Any]:
    """The step in the same layout without `measure`, and its overhead over the plain residual there, which
    does without it too: of the three, that is overlap alone.
    """
    found = without(config, machine, best, measure)
    plain = cost.plain_in_same_layout
    if measure is Measure.OVERLAP:
        plain = evaluate(plain_residual(config), machine, plain.layout, overlap=False)
    return {
        **_short(found.evaluation),
        "slower": found.slower,
        "fits": found.fits,
        "plain_step_seconds": plain.step_seconds,
        "overhead_ratio_same_layout": found.evaluation.step_seconds / plain.step_seconds - 1.0,
    }


def _keeping_everything(
    config: RunConfig, machine: Machine, num_devices: int, best: Evaluation
) -> dict[str, Any]:
    """What is left to a run that recomputes nothing: the fastest layout that then fits."""
    try:
        found = search(config, machine, num_devices, recompute=False).best[0]
    except NothingFitsError as error:
        return {"fits": False, "missing_bytes": error.smallest.peak_bytes - machine.memory_budget}
    return {**_short(found), "fits": True, "slower": found.step_seconds / best.step_seconds - 1.0}
