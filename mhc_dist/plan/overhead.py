"""What hyper-connections cost against the plain residual on the same cluster, and where it comes from.

The breakdown switches costs on one after the other, from the best plain layout to the run itself, so its
parts add up to the whole exactly:

    memory-forced   the plain residual in the run's layout, against its own best, where the run does not fit
    layout          the same where it would fit, but is slower: what it adds costs more in that layout
    kernels         the connections' kernels instead of one fused add and norm; what they repeat, too, where
                    even the plain residual recomputes everything
    recompute       regenerating streams
    p2p             n streams between pipeline ranks instead of one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mhc_dist.config import RunConfig
from mhc_dist.plan.boundaries import best_balance
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.costs import plain_residual
from mhc_dist.plan.evaluate import Evaluation, evaluate
from mhc_dist.plan.layout import Layout, same_layout
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.search import search


@dataclass(frozen=True)
class Overhead:
    """Ratios of the plain residual's best step. `plain` is that step's evaluation; `plain_in_same_layout` has
    the run's schedule, ranks and microbatches, is cut where either is fastest, and recomputes everything
    where it would not fit otherwise.
    """

    ratio: float
    breakdown: dict[str, float]
    plain: Evaluation
    plain_in_same_layout: Evaluation

    @property
    def ratio_in_same_layout(self) -> float:
        """Against the plain residual in the run's own layout: what published figures compare."""
        steps = 1.0 + self.ratio
        return steps * self.plain.step_seconds / self.plain_in_same_layout.step_seconds - 1.0

    @property
    def dominant(self) -> str:
        """The largest part of the breakdown."""
        return max(self.breakdown, key=lambda name: self.breakdown[name])


def overhead(config: RunConfig, machine: Machine, num_devices: int, chosen: Evaluation) -> Overhead:
    """Compare `chosen` (of `config`) with the plain residual on the same devices."""
    plain_config = plain_residual(config)
    layout = chosen.layout
    in_layout = plain_in_layout(plain_config, machine, layout)
    searched = search(plain_config, machine, num_devices).best[0]
    best_plain = min(searched, in_layout, key=_merit(machine))
    repeats = in_layout.layout.recompute_everything
    steps = [
        in_layout.step_seconds,
        evaluate(config, machine, layout, Charge(True, repeats, False)).step_seconds,
        evaluate(config, machine, layout, Charge(True, True, False)).step_seconds,
        chosen.step_seconds,
    ]
    base = best_plain.step_seconds
    names = ("kernels", "recompute", "p2p")
    breakdown = {name: (steps[i + 1] - steps[i]) / base for i, name in enumerate(names)}
    moved = (in_layout.step_seconds - base) / base
    fits = best_plain is in_layout or _fits(config, machine, best_plain.layout)
    breakdown["memory_forced"] = 0.0 if fits else moved
    breakdown["layout"] = moved if fits else 0.0
    return Overhead((chosen.step_seconds - base) / base, breakdown, best_plain, in_layout)


def plain_in_layout(config: RunConfig, machine: Machine, layout: Layout) -> Evaluation:
    """The plain residual in the run's layout: it keeps everything, or nothing if that does not fit."""
    kept = same_layout(layout)
    found = fastest_cut(config, machine, kept)
    if found.peak_bytes <= machine.memory_budget:
        return found
    return fastest_cut(config, machine, replace(kept, recompute_everything=True))


def fastest_cut(config: RunConfig, machine: Machine, layout: Layout) -> Evaluation:
    """`layout` as it is cut, or as suits `config` itself: boundaries that were sought for another run favour
    that one.
    """
    given = evaluate(config, machine, layout)
    own = best_balance(config, machine, evaluate(config, machine, replace(layout, boundaries=None)))
    return min(given, own, key=_merit(machine))


def _merit(machine: Machine) -> Callable[[Evaluation], tuple[bool, float]]:
    """What fits first, then the fastest."""
    return lambda found: (found.peak_bytes > machine.memory_budget, found.step_seconds)


def _fits(config: RunConfig, machine: Machine, layout: Layout) -> bool:
    return evaluate(config, machine, layout).peak_bytes <= machine.memory_budget
