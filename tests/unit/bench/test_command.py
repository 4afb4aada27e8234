"""How bench commands end. Oracle: exit codes and messages written by hand; ranks are real processes."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mhc_dist.bench.cell import run_ranks
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.config import RunConfig


def refuses(rank: int, store: str, config: RunConfig, result: Path) -> None:
    if rank == 1:
        raise ValueError("ratio=0 must be above 0.")
    signal.pause()


def is_killed(rank: int, store: str, config: RunConfig, result: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def fails(rank: int, store: str, config: RunConfig, result: Path) -> None:
    assert rank != 1, "our own mistake"
    signal.pause()


def bench(measure: Any) -> Bench:
    def run(config: RunConfig, options: argparse.Namespace) -> Outcome:
        return Outcome("name", "label", run_ranks(measure, config))

    return Bench("name", None, lambda parser: None, run)


@pytest.mark.parametrize(
    ("measure", "code", "text"),
    [
        (refuses, 2, "mhc-dist: ratio=0 must be above 0.\n"),
        (is_killed, 81, "mhc-dist: rank 1 of 2 ended (SIGKILL) while it measured"),
    ],
)
def test_what_a_rank_ends_with_is_told_in_one_line(
    measure: Any, code: int, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: as above; nothing is written, and the other rank waits for nobody."""
    with pytest.raises(SystemExit) as ended:
        bench(measure).main(["--results", str(tmp_path)])
    assert ended.value.code == code
    assert text in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    """Oracle: the line that failed, in the message."""
    with pytest.raises(Exception, match="our own mistake"):
        bench(fails).main(["--results", str(tmp_path)])


def test_a_file_that_the_result_replaces_goes_last(tmp_path: Path) -> None:
    """Oracle: it is gone, and the result is there."""
    kept = tmp_path / "name.unfinished.jsonl"
    kept.write_text("{}")

    def run(config: RunConfig, options: argparse.Namespace) -> Outcome:
        return Outcome("name", "label", {"figure": 1}, replaces=kept)

    Bench("name", None, lambda parser: None, run).main(["--results", str(tmp_path), "--json"])
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]
