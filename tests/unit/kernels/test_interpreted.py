"""Runs the interpreted kernel tests in another process, so that the suite itself stays uninterpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run_interpreted(tests: Path, marker: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "-m",
        marker,
        str(tests),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3500)
    nothing_selected = 5
    assert done.returncode in (0, nothing_selected), done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout or done.returncode == nothing_selected


@pytest.mark.timeout(600)
def test_interpreted() -> None:
    """Oracle: the assertions of the files themselves, run under Triton's interpreter."""
    run_interpreted(FOLDER, "not long")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("file", FILES)
def test_interpreted_long(file: str) -> None:
    """Oracle: the assertions of the file itself; the long sweeps, a process each."""
    run_interpreted(FOLDER / file, "long")
