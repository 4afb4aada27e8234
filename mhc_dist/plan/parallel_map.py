"""Independent simulations side by side, on the processors this machine has. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROCESSES = 8


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) for item in items], in order; function, items and results can be pickled.

    Processes are spawned, not forked: whoever plans may have threads.
    """
    listed = list(items)
    workers = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(listed))
    if workers < 2:
        return [function(item) for item in listed]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, listed))
