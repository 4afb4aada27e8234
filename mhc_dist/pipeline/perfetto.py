"""Runs as Perfetto (Chrome trace event) files, written and read. Standard library only.

One process per rank, one thread per lane. The arguments of an event hold the whole action, so that a file is
enough to calibrate a cost table (`calibrate`), wherever it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.demonstration import Shown

MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One action of one rank, in seconds. `lane` is "actions" for what the rank's thread did, or a link."""

    rank: int
    action: Action
    start: float
    end: float
    payload_bytes: int = 0
    lane: str = "actions"


def simulated_events(shown: Shown) -> list[TraceEvent]:
    """Every action of a simulated run, waits included, and every flight on its lane."""
    events: list[TraceEvent] = []
    for rank, timeline in enumerate(shown.simulation.ranks):
        events += [TraceEvent(rank, done.action, done.start, done.end) for done in timeline.actions]
        events += [
            TraceEvent(rank, flight.action, flight.start, flight.end, lane=flight.lane)
            for flight in timeline.flights
        ]
    return events


def write_perfetto(shown: Shown, path: Path) -> None:
    """Write a simulated run."""
    write_events(simulated_events(shown), path)


def write_events(events: Iterable[TraceEvent], path: Path) -> None:
    """Write events of any run; open the file at ui.perfetto.dev."""
    rows: list[dict[str, Any]] = []
    threads: dict[tuple[int, str], int] = {}
    for event in events:
        key = (event.rank, event.lane)
        if key not in threads:
            threads[key] = len([k for k in threads if k[0] == event.rank])
            rows.append(_name("process_name", event.rank, 0, f"rank {event.rank}"))
            rows.append(_name("thread_name", event.rank, threads[key], event.lane))
        rows.append(
            {
                "name": str(event.action),
                "cat": event.action.kind.value,
                "ph": "X",
                "ts": event.start * MICROSECONDS,
                "dur": (event.end - event.start) * MICROSECONDS,
                "pid": event.rank,
                "tid": threads[key],
                "args": {**_arguments(event.action), "bytes": event.payload_bytes, "lane": event.lane},
            }
        )
    path.write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))


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
            )
            for row in rows
            if row["ph"] == "X"
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trace of a run: {type(error).__name__} {error}") from None


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
