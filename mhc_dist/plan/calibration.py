"""Carries what a run measured over to other layouts: a factor per kind of work, measured over predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.cost import CostTable, ExchangeCost, PhaseCost


@dataclass(frozen=True)
class Calibration:
    """Factors on predicted seconds; 1 where the trace says nothing. Keys: (kind of item, half). overheads:
    seconds that actions other than phases take of the thread by themselves, as measured.
    """

    factors: dict[tuple[str, str], float]
    overheads: Mapping[ActionKind, float] = field(default_factory=dict)

    def factor(self, name: str, half: str) -> float:
        return self.factors.get((kind_of(name), half), 1.0)

    def apply(self, costs: CostTable) -> CostTable:
        """`costs` as the measured machine would have them."""
        return replace(
            costs,
            phases={key: self._phase(key[1], cost) for key, cost in costs.phases.items()},
            exchanges={key: self._exchange(key[1], cost) for key, cost in costs.exchanges.items()},
            message=replace(costs.message, seconds=costs.message.seconds * self.factor("message", "message")),
            reduce_seconds=costs.reduce_seconds * self.factor("reduce", "reduce"),
            overheads={**costs.overheads, **self.overheads},
        )

    def _phase(self, name: str, cost: PhaseCost) -> PhaseCost:
        return replace(
            cost,
            forward=cost.forward * self.factor(name, "forward"),
            input_gradient=cost.input_gradient * self.factor(name, "input_gradient"),
            weight_gradient=cost.weight_gradient * self.factor(name, "weight_gradient"),
            recompute=cost.recompute * self.factor(name, "recompute"),
        )

    def _exchange(self, name: str, cost: ExchangeCost) -> ExchangeCost:
        return replace(
            cost,
            forward=cost.forward * self.factor(name, "forward"),
            backward=cost.backward * self.factor(name, "backward"),
        )

    def text(self) -> str:
        """One line per factor and overhead."""
        lines = [f"  {kind} {half}: x{f:.3g}" for (kind, half), f in sorted(self.factors.items())]
        lines += [f"  {kind.value}: {seconds:.3g} s" for kind, seconds in sorted(self.overheads.items())]
        return "\n".join(lines)


PHASE_HALVES: dict[str, Callable[[PhaseCost], float]] = {
    "forward": lambda cost: cost.forward,
    "input_gradient": lambda cost: cost.input_gradient,
    "weight_gradient": lambda cost: cost.weight_gradient,
    "recompute": lambda cost: cost.recompute,
}

EXCHANGE_HALVES: dict[str, Callable[[ExchangeCost], float]] = {
    "forward": lambda cost: cost.forward,
    "backward": lambda cost: cost.backward,
}


def kind_of(name: str) -> str:
    """`attention.7` -> `attention`."""
    return name.partition(".")[0]


def compare(predicted: CostTable, measured: CostTable) -> Calibration:
    """Factors from two tables of the same layout: sums over all chunks, so that rare ones do not dominate."""
    sums: dict[tuple[str, str], list[float]] = {}

    def add(kind: str, half: str, before: float, after: float) -> None:
        total = sums.setdefault((kind, half), [0.0, 0.0])
        total[0] += before
        total[1] += after

    for key, phase in predicted.phases.items():
        for half, get in PHASE_HALVES.items():
            add(kind_of(key[1]), half, get(phase), get(measured.phases[key]))
    for key, exchange in predicted.exchanges.items():
        for half, get_exchange in EXCHANGE_HALVES.items():
            add(kind_of(key[1]), half, get_exchange(exchange), get_exchange(measured.exchanges[key]))
    add("message", "message", predicted.message.seconds, measured.message.seconds)
    add("reduce", "reduce", predicted.reduce_seconds, measured.reduce_seconds + measured.step_seconds)
    factors = {key: after / before for key, (before, after) in sums.items() if before > 0}
    return Calibration(factors, measured.overheads)
