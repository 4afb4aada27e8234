"""What the simulator says of a program whose costs were measured. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from mhc_dist.bench.hidden import HiddenReport, hidden_report, together
from mhc_dist.pipeline.action import Action, ActionKind, Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.trace import Event

TICKS_PER_SECOND = 1e9


def compared_steps(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Seconds of steps, predicted and measured one by one: medians, and the median of their ratios, which a
    machine that is faster in one minute than in another does not move.
    """
    ratios = [one / other for one, other in zip(predicted, measured, strict=True)]
    return {
        "predicted_seconds": median(predicted),
        "measured_seconds": median(measured),
        "ratio": median(ratios),
    }


def prediction(program: Program, costs: Sequence[CostTable], measured: Sequence[float]) -> dict[str, Any]:
    """Predicted and measured steps, and what is hidden in the predicted ones; what would be if every phase
    took its median time on all ranks. costs[i]: at the time of measured[i]. Medians over steps.
    """
    steps = [(Simulation(program, at_the_time), at_the_time) for at_the_time in costs]
    calm = [(Simulation(program, replace(c, jitter=None)), c) for c in costs]
    reports = [_report(*step) for step in steps]
    shares = [report.exposed_shares() for report in reports]
    recompute = [r for report in reports if (r := report.recompute_hidden_ratio) is not None]
    return {
        **compared_steps([simulation.makespan for simulation, _ in steps], measured),
        "all_to_all_hidden_ratio": median(report.hidden_ratio() for report in reports),
        "exposed_shares": {key: median(of_step[key] for of_step in shares) for key in shares[0]},
        "recompute_hidden_ratio": median(recompute) if recompute else None,
        "all_to_all_hidden_ratio_without_jitter": median(_report(*step).hidden_ratio() for step in calm),
        "seconds_without_jitter": median(simulation.makespan for simulation, _ in calm),
    }


def _report(simulation: Simulation, costs: CostTable) -> HiddenReport:
    """All ranks of the simulated step, judged as traces are. A payload's size stands for its time."""

    def ticks(action: Action) -> int:
        match action.kind:
            case ActionKind.ISSUE:
                return round(costs.wire_seconds(action) * TICKS_PER_SECOND)
            case ActionKind.SEND:
                return round(costs.message.seconds * TICKS_PER_SECOND)
            case _:
                return 0

    def seconds(payload: int) -> float:
        return payload / TICKS_PER_SECOND

    return together(
        hidden_report([Event(a.action, a.start, a.end, ticks(a.action)) for a in rank.actions], seconds)
        for rank in simulation.ranks
    )
