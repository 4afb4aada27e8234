"""How a rank with nothing to do passes the time.

A processor that slept computes slower for a while after it wakes, on some machines at some times: phases
behind a wait took up to a tenth longer on a virtual one. An accelerator does not doze, so that would count as
gained by overlap, which waits less, although no cluster has it. Where every rank has a core of its own,
ranks stay awake. Where they share cores they sleep, or they would take the processor from those that compute.
"""

from __future__ import annotations

import os
import select
import time
from typing import Protocol

BETWEEN_LOOKS = 2e-5  # seconds
"""Asking the kernel without pause slows down whoever computes next to it: behind such waits phases took 3
to 5 % longer than behind a loop that asks nobody."""


class Waiting(Protocol):
    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""
        ...

    def for_input(self, handle: int, seconds: float) -> None:
        """Let time pass until the pipe `handle` may have something to read, at most so long."""
        ...


class Asleep:
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def for_input(self, handle: int, seconds: float) -> None:
        select.select([handle], [], [], seconds)


class Awake:
    def sleep(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def for_input(self, handle: int, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while not select.select([handle], [], [], 0)[0] and time.perf_counter() < end:
            self.sleep(BETWEEN_LOOKS)


def waiting_for(num_ranks: int) -> Waiting:
    """Of `num_ranks` on this host."""
    return Awake() if num_ranks <= len(os.sched_getaffinity(0)) else Asleep()
