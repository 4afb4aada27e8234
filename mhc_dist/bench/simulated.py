"""What the simulator says of a program whose costs were measured, and how far it is off."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.simulate import Simulation


def predicted_seconds(program: Program, costs: CostTable) -> float:
    """The step as the simulator runs it."""
    return Simulation(program, costs).makespan


def prediction(program: Program, costs: CostTable, measured: Sequence[float]) -> dict[str, Any]:
    """Predicted and measured step, and their ratio."""
    predicted, seen = predicted_seconds(program, costs), median(measured)
    return {"predicted_seconds": predicted, "measured_seconds": seen, "ratio": predicted / seen}
