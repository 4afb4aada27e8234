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
    ActionKind.WAIT: "#e45756",
    ActionKind.ARRIVE: "#f0efec",
}
"""Colour per kind; ISSUE stands for exchanges in flight, SEND for transfers between pipeline ranks."""

LIGHTER = {
    ActionKind.COMPUTE: "#9ecae9",
    ActionKind.GRADIENT: "#a7d8a0",
    ActionKind.WEIGHT: "#fbd49b",
    ActionKind.RECOMPUTE: "#dcb8d2",
}
"""The same for every chunk of a rank but its first: in a V, the way back up."""

MEANINGS = {
    ActionKind.COMPUTE: "forward",
    ActionKind.GRADIENT: "backward (input gradient, or whole)",
    ActionKind.WEIGHT: "weight gradient",
    ActionKind.RECOMPUTE: "recompute",
    ActionKind.WAIT: "waits for an all-to-all",
    ActionKind.ARRIVE: "waits for a neighbour",
    ActionKind.ISSUE: "all-to-all in flight",
    ActionKind.SEND: "transfer to a neighbour",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One rectangle. `lane` is "compute" or the name of a communication lane. first_chunk: its chunk is the
    first that the rank holds.
    """

    rank: int
    lane: str
    action: Action
    start: float
    end: float
    first_chunk: bool = True

    @property
    def colour(self) -> str:
        kind = self.action.kind
        return COLOURS[kind] if self.first_chunk else LIGHTER.get(kind, COLOURS[kind])

    @property
    def label(self) -> str:
        """The microbatch, on what computes."""
        return str(self.action.microbatch) if self.action.kind in LIGHTER else ""


def bars(simulation: Simulation) -> list[Bar]:
    """All bars with a length, rank by rank, in order of time."""
    result: list[Bar] = []
    for rank, timeline in enumerate(simulation.ranks):
        first = min((a.action.chunk for a in timeline.actions if a.action.kind in LIGHTER), default=-1)
        for done in timeline.actions:
            if done.end > done.start:
                in_first = done.action.chunk == first
                result.append(Bar(rank, "compute", done.action, done.start, done.end, in_first))
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
