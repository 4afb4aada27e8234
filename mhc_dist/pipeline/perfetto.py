"""Runs, simulated and real, as Perfetto (Chrome trace event) files, written and read. Standard library only.

One process per rank, one thread per lane, an arrow from each message and exchange to where it is awaited. The
arguments of an event hold the whole action, so that a file is enough to calibrate a cost table (`calibrate`),
wherever it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.demonstration import Shown
from mhc_dist.pipeline.trace import Trace, awaited_action

MICROSECONDS = 1e6
ACTIONS = "actions"
"""The lane of what a rank's thread did."""

ARROW_ENDS = frozenset({ActionKind.SEND, ActionKind.ARRIVE, ActionKind.ISSUE, ActionKind.WAIT})


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One action of one rank, in seconds. `lane` is "actions" for what the rank's thread did, or a link.

    rank: pipeline rank of a simulated run, world rank of a real one; action's peers are pipeline ranks.
    column: data rank; messages stay within a column. blocked, starved: as in `trace.Event`.
    """

    rank: int
    action: Action
    start: float
    end: float
    payload_bytes: int = 0
    lane: str = ACTIONS
    column: int = 0
    blocked: float = 0.0
    starved: float = 0.0


def simulated_events(shown: Shown) -> list[TraceEvent]:
    """Every action of a simulated run, waits included, and every flight on its lane."""
    events: list[TraceEvent] = []
    for rank, timeline in enumerate(shown.simulation.ranks):
        events += [
            TraceEvent(rank, done.action, done.start, done.end, blocked=done.blocked, starved=done.starved)
            for done in timeline.actions
        ]
        events += [
            TraceEvent(rank, flight.action, flight.start, flight.end, lane=flight.lane)
            for flight in timeline.flights
        ]
    return events


def write_perfetto(shown: Shown, path: Path) -> None:
    """Write a simulated run."""
    write_events(simulated_events(shown), path)


def recorded_events(trace: Trace, rank: int, column: int = 0) -> list[TraceEvent]:
    """What a rank really did, as it goes into a file. rank: world rank; column: data rank."""
    return [
        TraceEvent(
            rank,
            event.action,
            event.start,
            event.end,
            event.payload_bytes,
            column=column,
            blocked=event.blocked,
            starved=event.starved,
        )
        for event in trace.events
    ]


def write_events(events: Iterable[TraceEvent], path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write events of any run, with facts about it; open the file at ui.perfetto.dev.

    The file appears whole or not at all.
    """
    rows: list[dict[str, Any]] = []
    threads: dict[tuple[int, str], int] = {}
    arrows: dict[tuple[object, ...], int] = {}
    for event in events:
        key = (event.rank, event.lane)
        if key not in threads:
            threads[key] = len([k for k in threads if k[0] == event.rank])
            rows.append(_name("process_name", event.rank, 0, f"rank {event.rank}"))
            rows.append(_name("thread_name", event.rank, threads[key], event.lane))
        place = {"pid": event.rank, "tid": threads[key]}
        rows.append(
            {
                "name": str(event.action),
                "cat": event.action.kind.value,
                "ph": "X",
                "ts": event.start * MICROSECONDS,
                "dur": (event.end - event.start) * MICROSECONDS,
                **place,
                "args": {
                    **_arguments(event.action),
                    "bytes": event.payload_bytes,
                    "lane": event.lane,
                    "column": event.column,
                    "blocked": event.blocked * MICROSECONDS,
                    "starved": event.starved * MICROSECONDS,
                    **_awaited(event),
                },
            }
        )
        if event.lane == ACTIONS and event.action.kind in ARROW_ENDS:
            number = arrows.setdefault(_transfer(event), len(arrows))
            rows.append(_arrow(event, number) | place)
    content = {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": dict(about or {})}
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


def read_events(path: Path) -> list[TraceEvent]:
    """Read a file written by `write_events`. ValueError if it is something else."""
    try:
        rows = json.loads(path.read_text())["traceEvents"]
        return [
            TraceEvent(
                rank=row["pid"],
                action=_action(row["args"]),
                start=row["ts"] / MICROSECONDS,
                end=(row["ts"] + row["dur"]) / MICROSECONDS,
                payload_bytes=row["args"]["bytes"],
                lane=row["args"]["lane"],
                # Files of earlier versions lack these.
                column=row["args"].get("column", 0),
                blocked=row["args"].get("blocked", 0.0) / MICROSECONDS,
                starved=row["args"].get("starved", 0.0) / MICROSECONDS,
            )
            for row in rows
            if row["ph"] == "X"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace of a run: {type(error).__name__} {error}") from None


def read_about(path: Path) -> dict[str, Any]:
    """The facts that were written with the events."""
    about: dict[str, Any] = json.loads(path.read_text()).get("otherData", {})
    return about


def _transfer(event: TraceEvent) -> tuple[object, ...]:
    """What names one transfer: a message between ranks of a column, or a rank's part of an exchange."""
    action = event.action
    if action.kind is ActionKind.ARRIVE:
        action = awaited_action(action) or action
    if action.kind is ActionKind.SEND:
        return (event.column, action.chunk, action.microbatch, action.direction)
    return (event.rank, action.chunk, action.microbatch, action.item, action.direction)


def _arrow(event: TraceEvent, number: int) -> dict[str, Any]:
    """One end of a transfer: from the start of its SEND or ISSUE to the end of its ARRIVE or WAIT."""
    begins = event.action.kind in (ActionKind.SEND, ActionKind.ISSUE)
    arrow = {"name": "transfer", "cat": "transfer", "id": number}
    if begins:
        return {**arrow, "ph": "s", "ts": event.start * MICROSECONDS}
    # An arrow ends at the action around it; at the very end of one, the next begins.
    return {**arrow, "ph": "f", "bp": "e", "ts": max(event.start, event.end - 1e-9) * MICROSECONDS}


def _awaited(event: TraceEvent) -> dict[str, str]:
    """What the action waited for, in words: an action of another rank."""
    awaited = awaited_action(event.action)
    if awaited is None or event.lane != ACTIONS:
        return {}
    who = "expert group" if event.action.peer is None else f"pipeline rank {event.action.peer}"
    return {"waits_for": f"{awaited} of {who}"}


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}


def _arguments(action: Action) -> dict[str, Any]:
    return {
        "kind": action.kind.value,
        "chunk": action.chunk,
        "microbatch": action.microbatch,
        "item": action.item,
        "direction": action.direction.value if action.direction else None,
        "peer": action.peer,
        "defer_weights": action.defer_weights,
    }


def _action(arguments: dict[str, Any]) -> Action:
    direction = arguments["direction"]
    return Action(
        kind=ActionKind(arguments["kind"]),
        chunk=arguments["chunk"],
        microbatch=arguments["microbatch"],
        item=arguments["item"],
        direction=Pass(direction) if direction else None,
        peer=arguments["peer"],
        defer_weights=arguments["defer_weights"],
    )
