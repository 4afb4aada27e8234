"""Ranks that wait, awake or asleep: the same waits, and who may stay awake."""

from __future__ import annotations

import os
import threading
import time

import pytest

from mhc_dist.bench.waiting import Asleep, Awake, Waiting, waiting_for


@pytest.mark.parametrize("waiting", [Asleep(), Awake()])
def test_waits_last_until_there_is_something_or_time_is_over(waiting: Waiting) -> None:
    """Oracle: the clock, and a pipe written to by another thread, which has to get a turn meanwhile."""
    start = time.perf_counter()
    waiting.sleep(0.02)
    assert time.perf_counter() - start >= 0.02
    inlet, outlet = os.pipe()
    start = time.perf_counter()
    waiting.for_input(inlet, 0.02)
    assert time.perf_counter() - start >= 0.02
    writer = threading.Timer(0.02, os.write, (outlet, b"x"))
    writer.start()
    start = time.perf_counter()
    waiting.for_input(inlet, 60.0)
    assert time.perf_counter() - start < 50.0
    assert os.read(inlet, 8) == b"x"
    writer.join()
    os.close(inlet)
    os.close(outlet)


def test_only_the_awake_use_their_processor() -> None:
    """Oracle: processor time of this thread over the wait."""
    used = []
    for waiting in (Asleep(), Awake()):
        start = time.thread_time()
        waiting.sleep(0.2)
        used.append(time.thread_time() - start)
    assert used[0] < 0.02
    assert used[1] > 2 * used[0]


def test_ranks_stay_awake_where_each_has_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: four cores, by hand."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5})
    assert [type(waiting_for(number)) for number in (1, 4, 5)] == [Awake, Awake, Asleep]
