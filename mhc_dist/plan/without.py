"""What the paper's three measures bring: a layout with one of them switched off. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mhc_dist.config import RunConfig
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.evaluate import Evaluation, evaluate
from mhc_dist.plan.layout import same_layout
from mhc_dist.plan.machine import Machine


class Measure(StrEnum):
    """What can be switched off."""

    FUSION = "fusion"  # connections run operation by operation
    RECOMPUTE = "recompute"  # everything is kept
    OVERLAP = "overlap"  # every exchange is awaited where it is issued


@dataclass(frozen=True)
class Without:
    """The chosen layout without one measure. `slower`: its step over that of the chosen one, minus 1."""

    measure: Measure
    evaluation: Evaluation
    slower: float
    fits: bool


def without(config: RunConfig, machine: Machine, chosen: Evaluation, measure: Measure) -> Without:
    """Simulate `chosen` with `measure` switched off, in the same layout, whether it fits or not."""
    layout = chosen.layout
    match measure:
        case Measure.FUSION:
            found = evaluate(config, machine, layout, Charge(fused=False))
        case Measure.RECOMPUTE:
            found = evaluate(config, machine, same_layout(layout))
        case Measure.OVERLAP:
            found = evaluate(config, machine, layout, overlap=False)
    return Without(
        measure,
        found,
        found.step_seconds / chosen.step_seconds - 1.0,
        found.peak_bytes <= machine.memory_budget,
    )


def without_text(results: list[Without], machine: Machine) -> str:
    """One line each."""
    lines = ["the first layout without"]
    for result in results:
        held = f"{result.evaluation.peak_bytes / 1e9:.1f} GB"
        room = "" if result.fits else f", which do not fit {machine.memory_budget / 1e9:.1f} GB"
        seconds = f"{result.evaluation.step_seconds:.4g} s ({result.slower:+.1%})"
        lines.append(f"  {result.measure.value:<10}{seconds}, {held}{room}")
    return "\n".join(lines)
