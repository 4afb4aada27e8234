from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mhc_dist.observe.step_traces import StepTraces, join_hosts
from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.demonstration import demonstrate
from mhc_dist.pipeline.perfetto import (
    read_about,
    read_events,
    recorded_events,
    simulated_events,
    write_events,
)
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.trace import Event, StepPhase, Trace, awaited_action
from mhc_dist.pipeline.wire import Wire, split_wait
from mhc_dist.topology import Topology

COMPUTE = Action(ActionKind.COMPUTE, 0, 0, "attention.0")
WAIT = Action(ActionKind.WAIT, 0, 0, "combine.0", Pass.FORWARD)
ARRIVE = Action(ActionKind.ARRIVE, 1, 0, direction=Pass.FORWARD, peer=0)


def test_phases_add_up_to_the_time_of_the_trace() -> None:
    """Oracle: a step written down by hand: what was starved is bubble, gaps are other."""
    trace = Trace(
        [
            Event(ARRIVE, 10.0, 13.0, 100, blocked=0.5, starved=2.5),
            Event(COMPUTE, 13.0, 14.0),
            Event(WAIT, 14.25, 15.25, 50, blocked=0.75, starved=0.25),
            Event(Action(ActionKind.STEP), 15.25, 16.25, starved=0.5),
        ]
    )
    assert trace.seconds == 6.25
    assert trace.phase_seconds() == {
        StepPhase.EXPOSED_P2P: 0.5,
        StepPhase.BUBBLE: 3.25,
        StepPhase.FORWARD: 1.0,
        StepPhase.EXPOSED_ALL_TO_ALL: 0.75,
        StepPhase.OPTIMIZER: 0.5,
        StepPhase.OTHER: 0.25,
    }


@pytest.mark.parametrize(
    ("seconds", "wire", "blocked", "starved"),
    [(5.0, 2.0, 2.0, 3.0), (1.0, 2.0, 1.0, 0.0), (5.0, None, 5.0, 0.0), (0.0, 2.0, 0.0, 0.0)],
)
def test_the_last_wire_time_of_a_wait_was_on_the_wire(
    seconds: float, wire: float | None, blocked: float, starved: float
) -> None:
    """Oracle: data that lands at the end of a wait left one wire time before."""
    assert split_wait(seconds, wire) == (blocked, starved)
    assert Wire(0.5, 0.25).seconds(6) == 2.0


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_wait_awaits_one_action_of_a_rank_that_does_it(name: str) -> None:
    """Oracle: the program: the awaited SEND is the peer's, the awaited ISSUE in each rank's own program."""
    program = demonstrate(make_schedule(name, 4, 8), wire=0.25).program
    done = [Counter(replace(action, peer=None) for action in actions) for actions in program.actions]
    for rank, actions in enumerate(program.actions):
        for action in actions:
            awaited = awaited_action(action)
            assert (awaited is not None) == (action.kind in (ActionKind.WAIT, ActionKind.ARRIVE))
            if awaited is not None:
                assert done[rank if action.peer is None else action.peer][awaited] == 1


def test_every_arrow_has_two_ends(tmp_path: Path) -> None:
    """Oracle: the file itself: each transfer starts in one action and ends in one, later or at once."""
    shown = demonstrate(make_schedule("dualpipev", 2, 4), wire=0.25)
    events = [event for event in simulated_events(shown) if event.lane == "actions"]
    columns = [replace(e, rank=2 * e.rank + column, column=column) for column in (0, 1) for e in events]
    write_events(columns, tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    starts = {row["id"]: row["ts"] for row in rows if row["ph"] == "s"}
    ends = {row["id"]: row["ts"] for row in rows if row["ph"] == "f"}
    assert starts.keys() == ends.keys()
    sends = (ActionKind.ISSUE, ActionKind.SEND)
    assert len(starts) == sum(event.action.kind in sends for event in columns)
    assert all(starts[number] <= ends[number] for number in starts)
    waits = [row for row in rows if "waits_for" in row.get("args", {})]
    assert len(waits) == len(ends)
    assert "send.F c0 m0 of pipeline rank 0" in {row["args"]["waits_for"] for row in waits}


def test_a_recorded_trace_survives_its_file(tmp_path: Path) -> None:
    """Oracle: the events written, all fields."""
    trace = Trace([Event(ARRIVE, 1.0, 3.0, 64, 0.5, 1.5), Event(WAIT, 3.0, 3.5, 32, 0.5)])
    written = recorded_events(trace, rank=3, column=1)
    write_events(written, tmp_path / "rank.json", {"step": 7})
    assert read_events(tmp_path / "rank.json") == written
    assert read_about(tmp_path / "rank.json") == {"step": 7}


def write_rank(folder: Path, rank: int, start: float, **about: object) -> Path:
    path = folder / f"rank_{rank}.json"
    write_events(recorded_events(Trace([Event(COMPUTE, start, start + 1.0)]), rank), path, about)
    return path


def test_hosts_are_joined_by_their_wall_clocks(tmp_path: Path) -> None:
    """Oracle: two hosts whose monotonic clocks began 100 s apart; the first one's is kept."""
    paths = [
        write_rank(tmp_path, 0, 5.0, host="a", wall_clock_ahead=1000.0),
        write_rank(tmp_path, 1, 5.5, host="a", wall_clock_ahead=1000.0001),
        write_rank(tmp_path, 2, 106.0, host="b", wall_clock_ahead=900.0),
    ]
    assert [(event.rank, event.start) for event in join_hosts(paths)] == [(0, 5.0), (1, 5.5), (2, 6.0)]


def test_rank_0_puts_the_chosen_steps_together_and_says_who_is_missing(tmp_path: Path) -> None:
    """Oracle: files of two of three ranks, and the third one's name."""
    place = Topology(3, 1, 1)
    for rank in (0, 2):
        traces = StepTraces(tmp_path, [2], place.at(rank))
        for step in (1, 2, 3):
            traces.write(step, Trace([Event(COMPUTE, step, step + 0.5)]), num_tokens=8)
    assert sorted(p.name for p in (tmp_path / "trace").iterdir()) == ["step_2"]
    traces = StepTraces(tmp_path, [2], place)
    traces.write(2, Trace([Event(COMPUTE, 2.0, 2.5)]), num_tokens=8)
    (sentence,) = traces.merge(patience_seconds=0.0)
    assert "without ranks 1:" in sentence
    assert "that all hosts share?" in sentence
    assert [event.rank for event in read_events(tmp_path / "trace" / "step_2.json")] == [0, 2]
