"""How bench commands end. Oracle: exit codes and messages written by hand; ranks are real processes."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
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


def waits(rank: int, store: str, config: RunConfig, result: Path) -> None:
    Path(os.environ["STARTED"], f"{os.getpid()}").write_text(store)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_ends_all_ranks(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a shell's exit code for Ctrl-C; nothing is printed, no rank and no folder of theirs is left."""
    monkeypatch.setenv("STARTED", str(tmp_path))
    output = tmp_path / "output"

    def main() -> None:
        with output.open("w") as to:
            os.dup2(to.fileno(), 2)
            bench(waits).main(["--results", str(tmp_path)])

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    assert process.pid is not None
    while len(started := [path for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert process.is_alive(), output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(30.0)
    assert (process.exitcode, output.read_text()) == (130, "")
    for path in started:
        assert not Path("/proc", path.name).exists()
        assert not Path(path.read_text()).parent.exists()


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
