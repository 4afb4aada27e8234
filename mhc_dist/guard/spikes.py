"""Losses that jump: seen against the median of recent ones, which a jump itself hardly moves."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

MAD_TO_DEVIATION = 1.4826
"""The median absolute deviation of a normal distribution times this is its standard deviation."""
SMALLEST_DEVIATION = 1e-3
"""Relative to the median: losses that happen to be nearly equal make no small step a spike."""
FEWEST = 10


class Spike(NamedTuple):
    """How far `loss` is above `median`, in robust standard deviations."""

    loss: float
    median: float
    deviations: float


class SpikeDetector:
    """Judges each step's loss by those of the `window` steps before it.

    A spike enters the window like any other loss: if the level has really changed, half a window later it is
    the usual one.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._threshold = threshold

    def judge(self, loss: float) -> Spike | None:
        """What is unusual about the next loss, or None. A loss that is not finite is another guard's."""
        if not math.isfinite(loss):
            return None
        found = self._spike(loss) if len(self._losses) >= FEWEST else None
        self._losses.append(loss)
        return found

    def _spike(self, loss: float) -> Spike | None:
        median = statistics.median(self._losses)
        mad = statistics.median(abs(past - median) for past in self._losses)
        deviation = max(MAD_TO_DEVIATION * mad, SMALLEST_DEVIATION * abs(median))
        if loss - median <= self._threshold * deviation:
            return None
        return Spike(loss, median, (loss - median) / deviation)
