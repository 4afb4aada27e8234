"""A request to stop: from the signal that this process caught to the deadline for ending in order."""

from __future__ import annotations

import math
import signal
import time

STOP_GRACE_SECONDS = 2.0
"""The launcher sends SIGTERM about a second after it saw a rank die: we have seen it too by then."""


class StopRequest:
    """Signals are noted by the rank that caught them; `reason` is what all ranks agree to follow."""

    def __init__(self, stop_seconds: float) -> None:
        self._stop_seconds = stop_seconds
        self._pending: tuple[signal.Signals, float] | None = None
        self._deadline = math.inf
        self.reason: str | None = None
        """Written by the watching thread, read by the main one."""

    def note(self, caught: signal.Signals) -> bool:
        """Hold a signal back for a moment; False if a stop was asked for already."""
        if self._pending is not None or self.reason is not None:
            return False
        self._pending = (caught, time.monotonic() + STOP_GRACE_SECONDS)
        return True

    def take_due(self) -> signal.Signals | None:
        """The signal held back long enough, once, unless another rank's request came first."""
        if self._pending is None or time.monotonic() < self._pending[1]:
            return None
        caught, _ = self._pending
        self._pending = None
        return caught if self.reason is None else None

    def accept(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._deadline = time.monotonic() + self._stop_seconds

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() >= self._deadline
