"""metrics.jsonl through crashes, restarts and odd numbers."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

from mhc_dist.observe.run_log import LOG_FILE, Record, RunLog, read_log


def test_records_come_back_in_order(tmp_path: Path) -> None:
    """Oracle: equality with what was appended; the folder is made if missing."""
    folder = tmp_path / "runs" / "a"
    records: list[Record] = [{"step": step, "loss": 1.0 / step, "phase": "train"} for step in range(1, 5)]
    with RunLog.create(folder) as log:
        for record in records:
            log.append(record)
    assert read_log(folder) == records


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """Oracle: a process that is killed right after append leaves the record behind."""
    child = os.fork()
    if child == 0:
        RunLog.create(tmp_path).append({"step": 1})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_log(tmp_path) == [{"step": 1}]


def test_half_a_line_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    """Oracle: a file cut in the middle of its last record; nothing else is lost, new ones are whole."""
    with RunLog.create(tmp_path) as log:
        for step in range(1, 4):
            log.append({"step": step, "loss": 2.5})
    path = tmp_path / LOG_FILE
    path.write_bytes(path.read_bytes()[:-7])
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    with RunLog.resume(tmp_path, last_step=3) as log:
        log.append({"step": 3, "loss": 1.0})
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]


def test_resuming_drops_steps_that_will_be_repeated(tmp_path: Path) -> None:
    """Oracle: a checkpoint at step 2 of 5: each step is there once afterwards."""
    with RunLog.create(tmp_path) as log:
        for step in range(1, 6):
            log.append({"step": step})
    with RunLog.resume(tmp_path, last_step=2) as log:
        log.append({"step": 3})
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3]


def test_a_new_run_keeps_the_old_log_under_another_name(tmp_path: Path) -> None:
    """Oracle: three runs of one name leave three files, the newest under the usual name."""
    for run in range(3):
        with RunLog.create(tmp_path) as log:
            log.append({"step": 1, "run": run})
    assert read_log(tmp_path) == [{"step": 1, "run": 2}]
    assert json.loads((tmp_path / "metrics.1.jsonl").read_text())["run"] == 0
    assert json.loads((tmp_path / "metrics.2.jsonl").read_text())["run"] == 1


def test_numbers_json_lacks_become_null(tmp_path: Path) -> None:
    """Oracle: a strict JSON parser accepts the line."""
    with RunLog.create(tmp_path) as log:
        log.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1})

    def refuse(word: str) -> float:
        raise AssertionError(word)

    line = (tmp_path / LOG_FILE).read_text()
    found = json.loads(line, parse_constant=refuse)
    assert found == {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.1}


def test_missing_and_damaged_logs_are_named(tmp_path: Path) -> None:
    """Oracle: file and line number in the message."""
    with pytest.raises(ValueError, match=r"metrics\.jsonl does not exist"):
        read_log(tmp_path)
    (tmp_path / LOG_FILE).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_log(tmp_path)
    (tmp_path / LOG_FILE).write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_log(tmp_path)
