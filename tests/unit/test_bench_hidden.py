"""Oracle: timelines written down by hand, whose hidden shares can be read off."""

from __future__ import annotations

import pytest

from mhc_dist.bench.hidden import hidden_report, together
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.trace import Event

F, B = Pass.FORWARD, Pass.BACKWARD


def event(
    kind: ActionKind, item: str, start: float, end: float, way: Pass | None = None, size: int = 0
) -> Event:
    return Event(Action(kind, 0, 0, item, way), start, end, size)


def test_shares_of_a_timeline() -> None:
    """A second a byte. dispatch flies 0..4, combine (queued behind it) 4..10."""
    events = [
        event(ActionKind.ISSUE, "dispatch.1", 0, 0, F, 4),
        event(ActionKind.RECOMPUTE, "attention.1", 0, 1),
        event(ActionKind.ISSUE, "combine.2", 1, 1, B, 6),
        event(ActionKind.WAIT, "dispatch.1", 1, 4, F),
        event(ActionKind.COMPUTE, "experts.1", 4, 10),
        event(ActionKind.WAIT, "combine.2", 10, 10, B),
        event(ActionKind.RECOMPUTE, "attention.2", 9, 12),
    ]
    report = hidden_report(events, float)
    assert report.hidden_ratio(("dispatch", F)) == pytest.approx(1 / 4)
    assert report.hidden_ratio(("combine", B)) == 1.0
    assert report.hidden_ratio() == pytest.approx(7 / 10)
    # One second of the first and one of the second recompute lie under a flight, of four in all.
    assert report.recompute_hidden_ratio == pytest.approx(2 / 4)


def test_waiting_is_told_apart_by_cause_and_by_part_of_the_step() -> None:
    """Oracle: a timeline by hand: a second a byte, the link delivers at 4, the peer's data come at 7."""
    events = [
        event(ActionKind.ISSUE, "dispatch.1", 0, 0, F, 4),
        event(ActionKind.COMPUTE, "shared.1", 0, 1),
        event(ActionKind.WAIT, "dispatch.1", 1, 7, F),
        event(ActionKind.COMPUTE, "experts.1", 7, 8),
        event(ActionKind.SEND, "", 8, 8, F, 5),
        event(ActionKind.GRADIENT, "experts.1", 8, 9),
        event(ActionKind.ISSUE, "dispatch.1", 9, 9, B, 2),
        event(ActionKind.WAIT, "dispatch.1", 10, 15, B),
    ]
    report = hidden_report(events, float)
    waited = report.exposed["dispatch", F]
    assert (waited.wire, waited.peer) == (3, 3)
    # The message occupies the link from 8 to 13, so the exchange lands at 15: all its wait is the wire's.
    assert (report.exposed["dispatch", B].wire, report.exposed["dispatch", B].peer) == (5, 0)
    assert report.hidden_ratio(("dispatch", F), wire_only=True) == pytest.approx(1 / 4)
    assert report.hidden_ratio(("dispatch", F)) == 0.0
    shares = report.exposed_shares()
    assert (shares["fill"], shares["steady"], shares["drain"]) == (1.0, 0.0, pytest.approx(5 / 6))
    both = together([report, report])
    assert both.exposed_shares() == pytest.approx(shares)


def test_nothing_recomputed_has_no_share() -> None:
    assert hidden_report([event(ActionKind.COMPUTE, "a.1", 0, 1)], float).recompute_hidden_ratio is None


def test_link_carries_one_payload_at_a_time() -> None:
    """Oracle: alpha + bytes / beta after the link became free, on a clock moved by hand."""
    now = [10.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    link = EmulatedLink(0.5, 100.0, clock=lambda: now[0], sleep=sleep)
    first, second = link.send(100), link.send(50)
    assert (first, second) == (11.5, 12.5)
    now[0] = 11.0
    link.wait(first)
    assert slept == [pytest.approx(0.5)]
    now[0] = 20.0
    link.wait(second)
    assert len(slept) == 1, "what has landed is not waited for"
    assert link.send(0) == 20.5
