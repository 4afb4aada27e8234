"""What must be set before test modules import torch, and what makes a process of many modules fast."""

from __future__ import annotations

import gc
import os

# Multi-rank tests fork. A forked child that inherits a used OpenMP pool waits forever for its threads, and
# with one thread there is no pool.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Python's cycle collector leaves alone what imports made: a million objects that stay.

    Otherwise it walks them again and again, and in forked ranks each walk copies their pages. It also comes
    less often: programs of schedules are hundreds of thousands of small objects without cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
