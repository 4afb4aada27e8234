"""How much of communication and recomputation was hidden, from what a rank did. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.trace import Event

Exchange = tuple[str, Pass]
"""(dispatch, F), (combine, B), ...: an item's name without its layer, and the direction."""

_COMPUTE = COMPUTE_KINDS - {ActionKind.RECOMPUTE}

FILL, STEADY, DRAIN = "fill", "steady", "drain"
"""Before a rank's first backward there is no backward to pair with, after its last forward no forward."""


@dataclass
class Exposed:
    """Seconds that a rank waited for one kind of exchange.

    wire: until the link had delivered. peer: from then on, for the data of a rank that was late. part: all of
    it, by where in the step it was.
    """

    wire: float = 0.0
    peer: float = 0.0
    part: dict[str, float] = field(default_factory=lambda: dict.fromkeys((FILL, STEADY, DRAIN), 0.0))

    @property
    def seconds(self) -> float:
        return self.wire + self.peer


@dataclass(frozen=True)
class HiddenReport:
    """Seconds in flight and seconds waited for, by exchange; seconds of compute, those of recomputation, and
    of these the ones under a flight.
    """

    flight_seconds: dict[Exchange, float]
    exposed: dict[Exchange, Exposed]
    recompute_seconds: float
    recompute_hidden_seconds: float
    compute_seconds: float
    """Phases, without recomputation."""

    @property
    def exposed_seconds(self) -> dict[Exchange, float]:
        return {name: exposed.seconds for name, exposed in self.exposed.items()}

    def hidden_ratio(self, *exchanges: Exchange, wire_only: bool = False) -> float:
        """Share of the flight time of `exchanges` (by default all) that nobody waited for.

        wire_only: waiting for a late peer does not count.
        """
        chosen = exchanges or tuple(self.flight_seconds)
        flight = sum(self.flight_seconds[name] for name in chosen)
        exposed = sum(self.exposed[name].wire if wire_only else self.exposed[name].seconds for name in chosen)
        return max(0.0, 1.0 - exposed / flight) if flight else 0.0

    def exposed_shares(self) -> dict[str, float]:
        """What was waited for, in terms of all flight time: by part of the step, by cause, by exchange."""
        flight = sum(self.flight_seconds.values())
        shares: dict[str, float] = defaultdict(float)
        for (item, direction), exposed in self.exposed.items():
            for part, seconds in exposed.part.items():
                shares[part] += seconds / flight
            shares["wire"] += exposed.wire / flight
            shares["peer"] += exposed.peer / flight
            shares[f"{item}_{'forward' if direction is Pass.FORWARD else 'backward'}"] += (
                exposed.seconds / flight
            )
        return dict(shares)

    @property
    def flight_to_compute_ratio(self) -> float:
        return sum(self.flight_seconds.values()) / self.compute_seconds

    @property
    def recompute_hidden_ratio(self) -> float | None:
        """None when nothing was recomputed."""
        if not self.recompute_seconds:
            return None
        return self.recompute_hidden_seconds / self.recompute_seconds


def hidden_report(events: Sequence[Event], link_seconds: Callable[[int], float]) -> HiddenReport:
    """What `events` of one rank show, on a link that carries a payload in `link_seconds(bytes)`.

    A flight begins at the end of its ISSUE or when the link is free, whichever is later; messages between
    pipeline ranks travel the same link.
    """
    flight: dict[Exchange, float] = defaultdict(float)
    exposed: dict[Exchange, Exposed] = defaultdict(Exposed)
    flights: list[tuple[float, float]] = []
    landing: dict[tuple[int, int, str, Pass | None], float] = {}
    part_of = _parts(events)
    free_at = 0.0
    for event in events:
        action = event.action
        if action.kind is ActionKind.SEND:
            free_at = max(event.end, free_at) + link_seconds(event.payload_bytes)
        if action.kind not in (ActionKind.ISSUE, ActionKind.WAIT) or action.direction is None:
            continue
        name = (action.item.partition(".")[0], action.direction)
        if action.kind is ActionKind.WAIT:
            landed = min(event.end, max(event.start, landing.pop(_key(action))))
            waited = exposed[name]
            waited.wire += landed - event.start
            waited.peer += event.end - landed
            waited.part[part_of(event)] += event.end - event.start
            continue
        seconds = link_seconds(event.payload_bytes)
        begin = max(event.end, free_at)
        free_at = begin + seconds
        landing[_key(action)] = free_at
        flight[name] += seconds
        flights.append((begin, free_at))
        exposed[name]  # an exchange that nobody waited for is exposed by nothing
    recomputed = [(e.start, e.end) for e in events if e.action.kind is ActionKind.RECOMPUTE]
    hidden = sum(_covered(start, end, flights) for start, end in recomputed)
    computed = sum(e.end - e.start for e in events if e.action.kind in _COMPUTE)
    recompute = sum(end - start for start, end in recomputed)
    return HiddenReport(dict(flight), dict(exposed), recompute, hidden, computed)


def together(reports: Iterable[HiddenReport]) -> HiddenReport:
    """Several ranks' reports of one step as one: seconds add up."""
    flight: dict[Exchange, float] = defaultdict(float)
    exposed: dict[Exchange, Exposed] = defaultdict(Exposed)
    recompute = hidden = computed = 0.0
    for report in reports:
        for name, seconds in report.flight_seconds.items():
            flight[name] += seconds
        for name, waited in report.exposed.items():
            total = exposed[name]
            total.wire += waited.wire
            total.peer += waited.peer
            for part, seconds in waited.part.items():
                total.part[part] += seconds
        recompute += report.recompute_seconds
        hidden += report.recompute_hidden_seconds
        computed += report.compute_seconds
    return HiddenReport(dict(flight), dict(exposed), recompute, hidden, computed)


def _parts(events: Sequence[Event]) -> Callable[[Event], str]:
    backwards = [e.start for e in events if e.action.kind is ActionKind.GRADIENT]
    forwards = [e.end for e in events if e.action.kind is ActionKind.COMPUTE]
    steady_from, steady_to = min(backwards, default=0.0), max(forwards, default=0.0)

    def part_of(event: Event) -> str:
        if event.end <= steady_from:
            return FILL
        return DRAIN if event.start >= steady_to else STEADY

    return part_of


def _key(action: Action) -> tuple[int, int, str, Pass | None]:
    return action.chunk, action.microbatch, action.item, action.direction


def _covered(start: float, end: float, intervals: Sequence[tuple[float, float]]) -> float:
    """Length of [start, end] inside intervals that do not overlap each other."""
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in intervals)
