"""The bars of a picture: what each lane of each rank does when. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.simulate import Simulation

COLOURS = {
    ActionKind.COMPUTE: "#4c78a8",
    ActionKind.GRADIENT: "#54a24b",
    ActionKind.WEIGHT: "#f2a541",
    ActionKind.RECOMPUTE: "#b279a2",
    ActionKind.REDUCE: "#9d755d",
    ActionKind.STEP: "#9d755d",
    ActionKind.ISSUE: "#bab0ac",
    ActionKind.SEND: "#72b7b2",
}
"""Colour per kind; ISSUE stands for exchanges in flight, SEND for transfers between pipeline ranks."""

MEANINGS = {
    ActionKind.COMPUTE: "forward",
    ActionKind.GRADIENT: "backward (input gradient, or whole)",
    ActionKind.WEIGHT: "weight gradient",
    ActionKind.RECOMPUTE: "recompute",
    ActionKind.ISSUE: "all-to-all in flight",
    ActionKind.SEND: "transfer to a neighbour",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One rectangle. `lane` is "compute" or the name of a communication lane."""

    rank: int
    lane: str
    action: Action
    start: float
    end: float

    @property
    def colour(self) -> str:
        return COLOURS[self.action.kind]


def bars(simulation: Simulation) -> list[Bar]:
    """All bars with a length, rank by rank, in order of time."""
    result: list[Bar] = []
    for rank, timeline in enumerate(simulation.ranks):
        for done in timeline.actions:
            waits = done.action.kind in (ActionKind.WAIT, ActionKind.ARRIVE)
            if done.end > done.start and not waits:
                result.append(Bar(rank, "compute", done.action, done.start, done.end))
        result += [
            Bar(rank, flight.lane, flight.action, flight.start, flight.end)
            for flight in timeline.flights
            if flight.end > flight.start
        ]
    return result


def lanes(all_bars: list[Bar]) -> list[str]:
    """Lane names, compute first."""
    others = sorted({bar.lane for bar in all_bars} - {"compute"})
    return ["compute", *others]
