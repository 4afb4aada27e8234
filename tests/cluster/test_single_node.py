"""A run on this host alone: how long until its first step."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from cluster_runs import ENVIRON, MHC_DIST, TINY, wait_for_step

LIMIT_SECONDS = 20.0


def test_four_processes_make_their_first_step_soon(tmp_path: Path) -> None:
    """Oracle: the clock, from the command to the first line of metrics; the limit holds on an idle"
    " machine."""
    busy = os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)
    values = ["train.steps=100000", "observe.metrics_port=0", f"train.output={tmp_path}"]
    overrides = [part for value in values for part in ("--set", value)]
    began = time.monotonic()
    process = subprocess.Popen(
        [MHC_DIST, "train", str(TINY), *overrides],
        env=os.environ | ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_step(tmp_path, 1, process, seconds=600)
        seconds = time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    print(f"start to first step, 4 processes: {seconds:.1f} s{' on a busy machine' if busy else ''}")
    assert process.returncode == 83
    assert busy or seconds < LIMIT_SECONDS
