"""What this rank says of itself: its action, since when, and one beat more each time it is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mhc_dist.guard.board import RankState, RankStatus
from mhc_dist.guard.liveness import ProcessName


@dataclass(frozen=True, slots=True)
class CurrentAction:
    """`str(action)` is taken by whoever needs the text, not when the action begins."""

    action: object
    since: float
    limit_seconds: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


class OwnStatus:
    """The main thread begins actions, the watching thread reads them and counts the beats."""

    def __init__(self, rank: int, process: ProcessName, limit_seconds: float) -> None:
        self.rank = rank
        self.process = process
        # Written by the main thread, read by the watching one. Assignments are atomic.
        self.current = CurrentAction("start", time.monotonic(), limit_seconds)
        self._beat = 0

    def begin(self, action: object, limit_seconds: float) -> None:
        self.current = CurrentAction(action, time.monotonic(), limit_seconds)

    def next(self, state: RankState) -> RankStatus:
        """What to publish now."""
        current = self.current
        since = time.time() - current.seconds
        self._beat += 1
        return RankStatus(self.rank, self.process, state, self._beat, str(current.action), since)
