"""How commands end that hand over to a module. Oracle: a shell's exit codes, and what runs afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAND_IN = """
import os, subprocess, sys, time
if sys.argv[1] == "fails":
    sys.exit(7)
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(600)
"""
LAUNCH = (
    "import sys; from mhc_launcher.modules import run_module; sys.exit(run_module('stand_in', sys.argv[1:]))"
)


def launched(folder: Path, argument: str) -> subprocess.Popen[str]:
    (folder / "stand_in.py").write_text(STAND_IN)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, argument],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


def is_running(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_stop_leaves_one_line_and_no_process(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = launched(tmp_path, "waits")
    assert process.stdout is not None
    *pids, threads = process.stdout.readline().split()
    assert len(pids) == 2
    assert threads == "1"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, f"mhc-dist: stopped by {number.name}.\n")
    deadline = time.monotonic() + 10.0
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_a_module_that_fails_passes_its_code_on(tmp_path: Path) -> None:
    process = launched(tmp_path, "fails")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 7
