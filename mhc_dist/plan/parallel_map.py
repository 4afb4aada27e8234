"""Independent simulations side by side, on the processors this machine has. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROCESSES = 8


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) for item in items], in order; function, items and results can be pickled.

    Processes are spawned, not forked: whoever plans may have threads. They end at once when this call does,
    whether it returns, raises, or the process that made it is killed. Ctrl-C is for the caller alone.
    """
    listed = list(items)
    workers = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(listed))
    if workers < 2:
        return [function(item) for item in listed]
    context = get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(theirs,))
    # What is closed first is `ours`, so that the pool need not wait for work that nobody wants any more.
    with theirs, pool, ours:
        # Spawned processes begin with the signals blocked that are blocked here. A Ctrl-C meanwhile waits.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(function, item) for item in listed]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return [future.result() for future in futures]


def _end_with(theirs: Connection) -> None:
    """Ends this process when nobody holds the other end of the pipe: its holder closed it, or is gone."""

    def watch() -> None:
        wait([theirs])
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
