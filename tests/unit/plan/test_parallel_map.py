"""Simulations side by side. Oracle: the same function, one item after the other."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mhc_dist.plan.parallel_map import parallel_map

TWO_SLEEPERS = """
import os, sys, time
from mhc_dist.plan.parallel_map import parallel_map
os.sched_getaffinity = lambda _: {0, 1}
parallel_map(time.sleep, 8 * [600.0])
"""


@pytest.mark.parametrize("count", [0, 1, 5])
def test_results_are_those_of_a_loop_and_in_order(count: int) -> None:
    assert parallel_map(math.sqrt, range(count)) == [math.sqrt(number) for number in range(count)]


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|expected a nonnegative"):
        parallel_map(math.sqrt, [1.0, -1.0, 4.0])


@contextmanager
def two_sleepers(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A process of a session of its own that maps over eight items for ever, and its two workers."""
    with (tmp_path / "said.txt").open("wb") as said:
        caller = subprocess.Popen(
            [sys.executable, "-c", TWO_SLEEPERS], stdout=said, stderr=said, start_new_session=True
        )
    workers: list[psutil.Process] = []
    try:
        while len(workers) < 2:
            assert caller.poll() is None, (tmp_path / "said.txt").read_text()
            workers = [
                child
                for child in psutil.Process(caller.pid).children()
                if "spawn_main" in " ".join(child.cmdline())
            ]
            time.sleep(0.05)
        yield caller, workers
    finally:
        for process in (psutil.Process(caller.pid),) if caller.poll() is None else ():
            process.kill()
        caller.wait()
        for worker in workers:
            if worker.is_running():
                worker.kill()


@pytest.mark.parametrize("at_work", [False, True])
def test_workers_end_when_their_caller_is_killed(at_work: bool, tmp_path: Path) -> None:
    """Oracle: the process table. Who gets SIGKILL can do nothing, be it while its workers start or later."""
    with two_sleepers(tmp_path) as (caller, workers):
        if at_work:
            wait_for_threads(workers)
        caller.kill()
        caller.wait()
        gone, left = psutil.wait_procs(workers, timeout=30)
        assert not left
        assert len(gone) == 2


@pytest.mark.parametrize("at_work", [False, True])
def test_ctrl_c_ends_caller_and_workers_at_once(at_work: bool, tmp_path: Path) -> None:
    """Oracle: what a terminal does: SIGINT to the whole group. The caller alone says something."""
    with two_sleepers(tmp_path) as (caller, workers):
        if at_work:
            wait_for_threads(workers)
        os.killpg(caller.pid, signal.SIGINT)
        assert caller.wait(30) == -signal.SIGINT
        gone, left = psutil.wait_procs(workers, timeout=30)
        assert not left
        assert len(gone) == 2
    said = (tmp_path / "said.txt").read_text()
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("KeyboardInterrupt")


def wait_for_threads(workers: list[psutil.Process]) -> None:
    """Until every worker watches its caller, and so is at its item."""
    while any(worker.num_threads() < 2 for worker in workers):
        time.sleep(0.05)
