"""A small run of the real trainer, and what tests of launchers ask about it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
from hosts import Host
from mhc_launcher.marked import is_rank

from mhc_dist.checkpoint.folder import committed
from mhc_dist.observe.run_log import read_log
from tests.small_run import SMALL_RUN

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"
MHC_DIST = str(Path(sys.executable).with_name("mhc-dist"))
# On the CPU, one thread a rank: several ranks share a core here.
ENVIRON = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
SMALL = [*SMALL_RUN, "train.steps=3", "checkpoint.mode=none"]
SAVING = ("train.steps=24", "checkpoint.mode=async", "checkpoint.every_steps=4", "checkpoint.keep_last=0")
"""A run that is long enough to be killed behind a commit."""


def settings(output: Path, *overrides: str) -> list[str]:
    return [part for value in [*SMALL, f"train.output={output}", *overrides] for part in ("--set", value)]


def train_command(output: Path, *options: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """`mhc-dist train` of the small run, four ranks, three steps."""
    return [MHC_DIST, "train", str(TINY), *settings(output, *overrides), *options]


def summary(out: str) -> dict[str, object]:
    """The last line of a run's output."""
    content: dict[str, object] = json.loads(out.strip().splitlines()[-1])
    return content


def wait_for_step(output: Path, step: int, process: Popen[str], seconds: float = 400) -> None:
    """Until the run has made `step` steps; fails at once when it ends before."""
    metrics = output / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"the run did not get to step {step} in {seconds} s"
        time.sleep(0.1)


def wait_for_commit(
    output: Path, after_step: int, process: Popen[str] | None = None, seconds: float = 400
) -> int:
    """Until a checkpoint of a later step than `after_step` is committed; returns the newest one's step.

    Fails at once when `process` ends before.
    """
    deadline = time.monotonic() + seconds
    while (newest := max(committed(output / "tiny" / "checkpoints"), default=0)) <= after_step:
        assert process is None or process.poll() is None, process and process.communicate()
        assert time.monotonic() < deadline, f"no commit after step {after_step} in {seconds} s"
        time.sleep(0.05)
    return newest


def kill_a_rank(host: Host) -> None:
    """SIGKILL to one rank on `host`; the others hear of it from their watchdogs, as after any crash."""
    for pid in host.pids():
        try:
            process = psutil.Process(pid)
            if is_rank(process.cmdline(), "mhc_dist.train"):
                process.kill()
                return
        except psutil.NoSuchProcess:
            continue
    raise AssertionError(f"no rank runs on {host.name}")


def losses(output: Path) -> list[object]:
    """Loss and gradient norm of every step, from the log."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_log(output / "tiny")]


def processes_of(output: Path) -> list[psutil.Process]:
    """Everything on this machine whose command line names the run's folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        ended = process.info["status"] == psutil.STATUS_ZOMBIE
        if not ended and str(output) in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def need(*programs: str) -> None:
    """Skip, loudly, where a program is missing: tests/cluster/install.sh installs them all on Debian."""
    missing = [name for name in programs if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing, and there is no apt-get to install it with")
