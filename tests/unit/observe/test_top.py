"""`mhc-dist top` against ranks that answer, hang and are gone."""

import json
from io import StringIO
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from mhc_dist.observe.exporter import start_exporter
from mhc_dist.observe.metrics import RankLabels
from mhc_dist.observe.rank_status import RankStatus
from mhc_dist.observe.target_file import announced_target
from mhc_dist.observe.top import Target, ask, find_targets, table
from mhc_dist.pipeline.trace import StepPhase
from tests.unit.observe.test_exporter import free_port

LABELS = RankLabels(global_rank=1, node="node1", pp_stage=0, dp_rank=1, ep_rank=1)


def status() -> RankStatus:
    rank_status = RankStatus(LABELS, lambda: ("wait.F c0 m1 dispatch.0", 7.5))
    shares = {
        StepPhase.FORWARD: 0.5,
        StepPhase.RECOMPUTE: 0.5,
        StepPhase.EXPOSED_ALL_TO_ALL: 0.75,
        StepPhase.BUBBLE: 0.25,
    }
    rank_status.step_done(12, 2.0, shares)
    return rank_status


def test_a_status_tells_shares_of_the_last_step() -> None:
    """Oracle: seconds over the step's two seconds, by hand; before the first step there are none."""
    now = status().now()
    assert (now["rank"], now["stage"], now["data_rank"], now["step"], now["step_seconds"]) == (
        1,
        0,
        1,
        12,
        2.0,
    )
    assert (now["action"], now["action_seconds"]) == ("wait.F c0 m1 dispatch.0", 7.5)
    assert (now["computing"], now["exposed_all_to_all"], now["exposed_p2p"], now["bubble"]) == (
        0.5,
        0.375,
        0.0,
        0.125,
    )
    before = RankStatus(LABELS).now()
    assert (before["step"], before["action"], before["computing"]) == (None, None, 0)


def test_ranks_are_found_asked_and_shown(tmp_path: Path) -> None:
    """Oracle: one rank that serves and one whose port nobody listens on."""
    exporter = start_exporter(CollectorRegistry(), free_port(), address="127.0.0.1", status=status().now)
    run = tmp_path / "a"
    try:
        with (
            announced_target(tmp_path, "a", 1, "127.0.0.1", exporter.port),
            announced_target(tmp_path, "a", 0, "127.0.0.1", free_port()),
            announced_target(tmp_path, "a.b", 0, "127.0.0.1", exporter.port),
        ):
            targets = find_targets(run)
            assert [target.rank for target in targets] == [0, 1]
            answers = ask(targets)
    finally:
        exporter.close()
    assert answers[0] is None
    assert json.loads(json.dumps(answers[1])) == status().now()
    for width in (160, 80):
        shown = StringIO()
        Console(file=shown, width=width).print(table(run, targets, answers, width))
        assert "a: step 12" in shown.getvalue()
        assert "no answer" in shown.getvalue()
        (line,) = (line for line in shown.getvalue().splitlines() if "wait.F c0 m1 dispatch.0" in line)
        assert len(line) <= width
        place, step = (["0", "1", "1"], ["12"]) if width == 160 else (["0/1/1"], [])
        doing, took, shares = (
            ["wait.F", "c0", "m1", "dispatch.0", "7.5", "s"],
            ["2.00", "s"],
            "50% 38% 0% 12%",
        )
        words = line.replace("│", " ").split()
        assert words == ["1", "node1", *place, *doing, *step, *took, *shares.split()]


def test_a_run_that_serves_nothing_is_explained(tmp_path: Path) -> None:
    """Oracle: the words a user needs."""
    with pytest.raises(ValueError, match="has ended or has not started"):
        find_targets(tmp_path / "tiny")


def test_an_address_that_does_not_speak_http_is_no_answer() -> None:
    """Oracle: a listener that closes at once."""
    assert ask([Target(0, f"127.0.0.1:{free_port()}")]) == [None]
