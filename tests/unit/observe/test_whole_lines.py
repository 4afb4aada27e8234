"""Logs on a disk that is full: the kernel's limit on the size of a file stands for one."""

from __future__ import annotations

import json
import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from mhc_dist.observe import whole_lines
from mhc_dist.observe.metrics import RankStep
from mhc_dist.observe.rank_log import RankLog, read_rank_logs
from mhc_dist.observe.run_log import RunLog, read_log

LIMIT = 1000


def in_a_child_with_small_files(work: Callable[[], None]) -> None:
    """Run `work` where no file can grow beyond LIMIT; its failure is a failure here."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            work()
        except BaseException:  # a forked test must not go on as a second pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_does_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    """Oracle: the records that were accepted, and none else; what comes later, and fits, is whole."""
    accepted = tmp_path / "accepted"

    def work() -> None:
        log, steps = RunLog.create(tmp_path), []
        for step in range(1, 30):
            try:
                log.append({"step": step, "text": "x" * (5 if step == 29 else 90)})
                steps.append(step)
            except OSError:
                continue
        accepted.write_text(json.dumps(steps))

    in_a_child_with_small_files(work)
    steps = json.loads(accepted.read_text())
    assert [record["step"] for record in read_log(tmp_path)] == steps
    assert 5 < len(steps) < 29
    assert steps[-1] == 29


def test_a_rank_adds_up_what_it_could_not_write(tmp_path: Path) -> None:
    """Oracle: the sum of all steps, once there is room again."""
    log = RankLog(tmp_path, rank=0, stage=0)
    log.step(1, RankStep(seconds=0.5))
    path = tmp_path / "ranks" / "rank_0.jsonl"
    path.unlink()
    path.mkdir()  # cannot be written
    with pytest.raises(OSError, match="rank_0"):
        log.flush()
    path.rmdir()
    for step in range(2, 11):
        log.step(step, RankStep(seconds=0.5))
    (times,) = read_rank_logs(tmp_path)
    assert [(line["step"], line["num_steps"], line["seconds"]) for line in times.lines] == [(10, 10, 5.0)]


def test_a_log_keeps_its_content_when_another_does_not_fit(tmp_path: Path) -> None:
    """Oracle: the content before."""
    path = tmp_path / "log"
    path.write_text("old\n")

    def work() -> None:
        with pytest.raises(OSError, match="too large"):
            whole_lines.replace(path, "x" * 2 * LIMIT)

    in_a_child_with_small_files(work)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
