"""The largest heap of a stretch of code, looked at a thousand times a second. Linux with glibc only."""

from __future__ import annotations

import gc
import threading
from types import TracebackType
from typing import Self

from mhc_dist.bench.heap import heap_bytes

INTERVAL_SECONDS = 1e-3


class PeakHeap:
    """`with PeakHeap() as peak: ...`, then `peak.bytes`: most bytes held beyond those at the start.

    A second thread looks, so a peak shorter than a millisecond can be missed, and what is measured runs a
    little slower: measure time in another run.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        gc.collect()
        self._start = heap_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            self.bytes = max(self.bytes, heap_bytes() - self._start)
