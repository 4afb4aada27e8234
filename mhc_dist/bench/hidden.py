"""How much of communication and recomputation was hidden, from what a rank did. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mhc_dist.pipeline.action import ActionKind, Pass
from mhc_dist.pipeline.trace import Event

Exchange = tuple[str, Pass]
"""(dispatch, F), (combine, B), ...: an item's name without its layer, and the direction."""


@dataclass(frozen=True)
class HiddenReport:
    """Seconds in flight and seconds waited for, by exchange; recompute seconds, and those under a flight."""

    flight_seconds: dict[Exchange, float]
    exposed_seconds: dict[Exchange, float]
    recompute_seconds: float
    recompute_hidden_seconds: float

    def hidden_ratio(self, *exchanges: Exchange) -> float:
        """Share of the flight time of `exchanges` (by default all) that nobody waited for."""
        chosen = exchanges or tuple(self.flight_seconds)
        flight = sum(self.flight_seconds[name] for name in chosen)
        exposed = sum(self.exposed_seconds[name] for name in chosen)
        return max(0.0, 1.0 - exposed / flight) if flight else 0.0

    @property
    def recompute_hidden_ratio(self) -> float | None:
        """None when nothing was recomputed."""
        if not self.recompute_seconds:
            return None
        return self.recompute_hidden_seconds / self.recompute_seconds


def hidden_report(events: Sequence[Event], link_seconds: Callable[[int], float]) -> HiddenReport:
    """What `events` of one rank show, on a link that carries a payload in `link_seconds(bytes)`.

    A flight begins at its ISSUE or when the link is free, whichever is later. All of a WAIT counts as
    exposed, whether it waited for the link or for a slower peer.
    """
    flight: dict[Exchange, float] = defaultdict(float)
    exposed: dict[Exchange, float] = defaultdict(float)
    flights: list[tuple[float, float]] = []
    free_at = 0.0
    for event in events:
        action = event.action
        if action.kind not in (ActionKind.ISSUE, ActionKind.WAIT) or action.direction is None:
            continue
        name = (action.item.partition(".")[0], action.direction)
        if action.kind is ActionKind.WAIT:
            exposed[name] += event.end - event.start
            continue
        seconds = link_seconds(event.payload_bytes)
        begin = max(event.end, free_at)
        free_at = begin + seconds
        flight[name] += seconds
        flights.append((begin, free_at))
    recomputed = [(e.start, e.end) for e in events if e.action.kind is ActionKind.RECOMPUTE]
    hidden = sum(_covered(start, end, flights) for start, end in recomputed)
    for name in flight:
        exposed.setdefault(name, 0.0)
    return HiddenReport(dict(flight), dict(exposed), sum(end - start for start, end in recomputed), hidden)


def _covered(start: float, end: float, intervals: Sequence[tuple[float, float]]) -> float:
    """Length of [start, end] inside intervals that do not overlap each other."""
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in intervals)
