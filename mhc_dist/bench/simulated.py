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


def predicted_seconds(program: Program, costs: CostTable) -> float:
    """The step as the simulator runs it."""
    return Simulation(program, costs).makespan


def prediction(program: Program, costs: CostTable, measured: Sequence[float]) -> dict[str, Any]:
    """Predicted and measured step and their ratio; what is hidden there, and what would be if every phase
    took its median time on all ranks.
    """
    simulation = Simulation(program, costs)
    predicted, seen = simulation.makespan, median(measured)
    report = _report(simulation, costs)
    calm = Simulation(program, replace(costs, jitter=None))
    return {
        "predicted_seconds": predicted,
        "measured_seconds": seen,
        "ratio": predicted / seen,
        "all_to_all_hidden_ratio": report.hidden_ratio(),
        "exposed_shares": report.exposed_shares(),
        "recompute_hidden_ratio": report.recompute_hidden_ratio,
        "all_to_all_hidden_ratio_without_jitter": _report(calm, costs).hidden_ratio(),
        "seconds_without_jitter": calm.makespan,
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
