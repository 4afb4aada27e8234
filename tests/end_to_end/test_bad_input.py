from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.small_run import SMALL_RUN

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def start(output: Path, *overrides: str) -> subprocess.Popen[str]:
    """`mhc-dist train` of a small model, on four processes unless the overrides say otherwise."""
    command = [str(Path(sys.executable).with_name("mhc-dist")), "train", str(TINY)]
    for override in [*SMALL_RUN, f"train.output={output}", *overrides]:
        command += ["--set", override]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks(output: Path) -> dict[int, psutil.Process]:
    """The running ranks of the run that writes below `output`."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if command[1:4] == ["-u", "-m", "mhc_dist.train"] and str(output) in " ".join(command):
            found[int(process.environ()["RANK"])] = process
    return found


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = output / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get to the step in 150 s"
        time.sleep(0.1)


# Starting takes ten seconds on two idle cores and several times that on busy ones.
pytestmark = pytest.mark.timeout(240)


# Rank 0 has the run's store and its log; what is left when any other one dies, tests/multi_rank shows faster.
@pytest.mark.parametrize("victim", [0, pytest.param(3, marks=pytest.mark.long)])
def test_a_rank_that_dies_in_step_3_ends_the_run_and_is_named(victim: int, tmp_path: Path) -> None:
    """Oracle: the rank this test kills. The others must end within a minute and say which one it was."""
    process = start(tmp_path, "train.steps=100000")
    wait_for_step(tmp_path, 2, process)
    survivors = ranks(tmp_path)
    assert sorted(survivors) == [0, 1, 2, 3]
    dead = survivors.pop(victim)
    dead.send_signal(signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode not in (0, 1, 2)
    told = {int(match[1]) for match in re.finditer(rf"^\[rank (\d)\] rank {victim} ", err, re.MULTILINE)}
    assert told == set(survivors), err
    assert "Traceback" not in err, err
    assert "c10d" not in err, err
    assert "mhc-dist: run tiny failed" in err.splitlines()[-1]
    assert not out.rstrip().endswith("}"), "a failed run has no summary"
    assert not [rank for rank in survivors.values() if rank.is_running()]


def test_a_request_to_stop_ends_the_run_in_order(tmp_path: Path) -> None:
    """Oracle: exit code 83 of guard/exit_codes.py, and a metrics file that ends with a whole line."""
    process = start(tmp_path, "train.steps=100000", "parallel.pipeline=1", "schedule.cluster=null")
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 83, (out, err)
    assert "Traceback" not in err, err
    assert err.splitlines()[-1] == "mhc-dist: run tiny was stopped by SIGTERM."
    lines = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert ranks(tmp_path) == {}
