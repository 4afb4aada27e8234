"""Costs from what a run really did: medians of its actions replace the seconds of a cost table.

Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Protocol

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.clock import message_of
from mhc_dist.pipeline.cost import CostTable, ExchangeCost, Jitter, MessageCost, PhaseCost
from mhc_dist.pipeline.perfetto import TraceEvent
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.tempo import Tempo

BLOCKED_SHARE = 0.05
"""A wait at least this long, in terms of the flight, shows when the flight landed; a shorter one only that it
had landed before."""

THREAD_KINDS = (
    ActionKind.ISSUE,
    ActionKind.SEND,
    ActionKind.RECV,
    ActionKind.HAND_OVER,
    ActionKind.FREE,
)
"""They take time of the rank's own thread and never wait."""

Key = tuple[int, str]


class Ran(Protocol):
    """An action that ran, in seconds."""

    @property
    def action(self) -> Action: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


def calibrate(costs: CostTable, events: Sequence[TraceEvent]) -> CostTable:
    """`costs` with the seconds of everything that `events` (of one or more steps, all ranks) contain.

    Bytes and lanes stay as they are. A full backward is divided into its halves as `costs` divides it, where
    no split one was seen. ValueError if the trace holds phases that `costs` does not know.
    """
    done = [event for event in events if event.lane == "actions"]
    phases = _phases(costs, done)
    return replace(
        costs,
        phases=phases,
        exchanges=_exchanges(costs, done),
        message=_message(costs, done),
        reduce_seconds=_median_of(done, ActionKind.REDUCE, costs.reduce_seconds),
        step_seconds=_median_of(done, ActionKind.STEP, costs.step_seconds),
        overheads=dict(costs.overheads) | _overheads(done),
    )


def jitter_of(costs: CostTable, ranks: Sequence[Sequence[Sequence[Ran]]]) -> Jitter:
    """How phases differ from `costs` in ranks[p][m], what the members of one expert group of each pipeline
    rank did in the same steps, in order. ValueError if a rank ran no phase that costs something.
    """
    return Jitter(tuple(tuple(_tempo(costs, member) for member in group) for group in ranks))


def _tempo(costs: CostTable, events: Sequence[Ran]) -> Tempo:
    phases = [event for event in events if event.action.kind in COMPUTE_KINDS]
    known = [(costs.seconds(event.action), event.end - event.start) for event in phases]
    pieces = tuple((cost, lasted / cost) for cost, lasted in known if cost > 0)
    if not pieces:
        raise ValueError(f"none of {len(phases)} phases costs anything: their tempo says nothing.")
    return Tempo(pieces)


def _seconds(event: TraceEvent) -> float:
    return event.end - event.start


def _median_of(events: Sequence[TraceEvent], kind: ActionKind, otherwise: float) -> float:
    # The end of a step waits for the slowest rank; that is no cost of its own.
    seen = [_seconds(event) - event.starved for event in events if event.action.kind is kind]
    return median(seen) if seen else otherwise


def _phases(costs: CostTable, events: Sequence[TraceEvent]) -> dict[Key, PhaseCost]:
    seen: dict[tuple[Key, str], list[float]] = defaultdict(list)
    for event in events:
        action = event.action
        part = _part(action)
        if part is not None:
            key = (action.chunk, action.item)
            if key not in costs.phases:
                raise ValueError(
                    f"the trace has phase {action.item} of chunk {action.chunk}, which this run lacks."
                    " Calibrate with a trace of the same configuration."
                )
            seen[key, part].append(_seconds(event))
    return {
        key: _phase(cost, {p: median(s) for (k, p), s in seen.items() if k == key})
        for key, cost in costs.phases.items()
    }


def _part(action: Action) -> str | None:
    match action.kind:
        case ActionKind.COMPUTE:
            return "forward"
        case ActionKind.GRADIENT:
            return "input" if action.defer_weights else "full"
        case ActionKind.WEIGHT:
            return "weight"
        case ActionKind.RECOMPUTE:
            return "recompute"
        case _:
            return None


def _phase(cost: PhaseCost, seen: dict[str, float]) -> PhaseCost:
    backward = cost.input_gradient + cost.weight_gradient
    share = cost.input_gradient / backward if backward else 1.0
    full = seen.get("full")
    inputs = seen.get("input", cost.input_gradient if full is None else full * share)
    weights = seen.get("weight")
    if weights is None:
        # A phase without weight gradients never defers, so its whole backward is the input half.
        weights = cost.weight_gradient if full is None else max(0.0, full - inputs)
    return replace(
        cost,
        forward=seen.get("forward", cost.forward),
        input_gradient=inputs,
        weight_gradient=weights,
        recompute=seen.get("recompute", cost.recompute),
    )


def _exchanges(costs: CostTable, events: Sequence[TraceEvent]) -> dict[Key, ExchangeCost]:
    """Time in flight of exchanges that were alone on their rank's wires and whose wait blocked."""
    exact: dict[tuple[Key, Pass], list[float]] = defaultdict(list)
    bounds: dict[tuple[Key, Pass], list[float]] = defaultdict(list)
    flying: dict[int, dict[tuple[int, int, str, Pass | None], tuple[float, bool]]] = defaultdict(dict)
    for event in sorted(events, key=lambda e: (e.rank, e.start, e.end)):
        action = event.action
        in_flight = flying[event.rank]
        name = (action.chunk, action.microbatch, action.item, action.direction)
        if action.kind is ActionKind.ISSUE:
            in_flight.update({other: (start, False) for other, (start, _) in in_flight.items()})
            in_flight[name] = (event.end, not in_flight)
        elif action.kind is ActionKind.WAIT and name in in_flight and action.direction is not None:
            start, alone = in_flight.pop(name)
            seconds = event.end - start
            blocked = _seconds(event) > BLOCKED_SHARE * seconds
            found = exact if alone and blocked else bounds
            found[(action.chunk, action.item), action.direction].append(seconds)

    def measured(key: Key, direction: Pass, otherwise: float) -> float:
        if exact[key, direction]:
            return median(exact[key, direction])
        return min(bounds[key, direction], default=otherwise)

    return {
        key: replace(
            cost,
            forward=measured(key, Pass.FORWARD, cost.forward),
            backward=measured(key, Pass.BACKWARD, cost.backward),
        )
        for key, cost in costs.exchanges.items()
    }


def _overheads(events: Sequence[TraceEvent]) -> dict[ActionKind, float]:
    """What actions that only start, end or hand on something take by themselves; of waits, those that found
    everything there.
    """
    seen: dict[ActionKind, list[float]] = defaultdict(list)
    issued: dict[tuple[int, int, int, str, Pass | None], float] = {}
    for event in sorted(events, key=lambda e: (e.rank, e.start, e.end)):
        action = event.action
        name = (event.rank, action.chunk, action.microbatch, action.item, action.direction)
        if action.kind in THREAD_KINDS:
            seen[action.kind].append(_seconds(event))
        if action.kind is ActionKind.ISSUE:
            issued[name] = event.start
        elif action.kind is ActionKind.WAIT and name in issued:
            flight = event.end - issued.pop(name)
            if _seconds(event) <= BLOCKED_SHARE * flight:
                seen[action.kind].append(_seconds(event))
    # Not medians: a few that had to wait for a lock make most of the time, and it is all of it that counts.
    return {kind: fmean(seconds) for kind, seconds in seen.items()}


def _message(costs: CostTable, events: Sequence[TraceEvent]) -> MessageCost:
    """Time from the end of a SEND to that of its ARRIVE, where the receiver was waiting for it.

    Times of different ranks are compared, so their clocks must agree, as they do on one host.
    """
    sent = {
        (event.column, message_of(event.action)): event.end
        for event in events
        if event.action.kind is ActionKind.SEND
    }
    seen = []
    for event in events:
        if event.action.kind is ActionKind.ARRIVE:
            start = sent.get((event.column, message_of(event.action)))
            if start is not None and event.start <= start < event.end:
                seen.append(event.end - start)
    return replace(costs.message, seconds=median(seen)) if seen else costs.message
