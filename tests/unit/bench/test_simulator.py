"""Which cases the simulator bench measures, keeps and refuses. Oracle: rows written down by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhc_dist.bench import simulator
from mhc_dist.bench.simulator import CaseName, Plan
from mhc_dist.bench.unfinished import Row, Unfinished
from mhc_dist.config import RunConfig
from tests.small import small_config

CASES: tuple[CaseName, ...] = (("1f1b", "none"), ("1f1b", "mhc"), ("zbv", "none"))
PLAN = Plan(CASES, ratio=0.6, rounds=2, slow_motion=4.0, max_overrun=0.05, routing="even")


def row(case: CaseName, overrun: float = 0.01) -> Row:
    return {"schedule": case[0], "recompute": case[1], "ratio": 1.02, "overrun_share": overrun}


@pytest.fixture
def unfinished(tmp_path: Path) -> Unfinished:
    return Unfinished.begin(tmp_path / "cases.jsonl", {})


class Ranks:
    """In place of the ranks: a call measures the next of `calls`: valid rows, and late ones."""

    def __init__(self, *calls: tuple[list[Row], list[Row]]) -> None:
        self._calls, self.asked = iter(calls), list[tuple[CaseName, ...]]()

    def __call__(self, measure: Any, config: RunConfig, plan: Plan, unfinished: Unfinished) -> dict[str, Any]:
        self.asked.append(plan.cases)
        valid, late = next(self._calls)
        for one in valid:
            unfinished.add(one)
        return {"late": late}


def test_a_second_run_measures_what_is_missing(
    unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: one case late in the first run; rows come in the plan's order, whenever they were measured."""
    first, second, third = CASES
    ranks = Ranks(([row(first), row(third)], [row(second, 0.07)]), ([row(second)], []))
    monkeypatch.setattr(simulator, "run_ranks", ranks)
    with pytest.raises(ValueError, match=r"2 of 3 cases .*5\.0% in 1f1b mhc 7\.0%: .* with --resume"):
        simulator.run(small_config(), PLAN, unfinished)
    assert simulator.run(small_config(), PLAN, unfinished) == [row(first), row(second), row(third)]
    assert simulator.run(small_config(), PLAN, unfinished) == [row(first), row(second), row(third)]
    assert ranks.asked == [CASES, (second,)]


def test_time_that_is_over_says_how_to_go_on(unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one case of three, nothing of processors."""
    monkeypatch.setattr(simulator, "run_ranks", Ranks(([row(CASES[0])], [])))
    with pytest.raises(ValueError, match=r"1 of 3 cases are .*jsonl\. The same command with --resume"):
        simulator.run(small_config(), PLAN, unfinished)
