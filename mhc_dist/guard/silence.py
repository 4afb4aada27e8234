"""Which ranks have fallen silent: told by their heartbeats, where their processes cannot be seen.

A rank reads only its next neighbour's beat. If that stops, a whole machine may be gone: then it takes a
second look at everybody, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from mhc_dist.guard.board import Board, RankState, RankStatus
from mhc_dist.guard.watch_limits import WatchLimits


@dataclass(frozen=True, slots=True)
class Lost:
    """Ranks taken for dead, with their last status (None: never joined), and what tells that they are."""

    statuses: dict[int, RankStatus | None]
    reason: str


@dataclass(frozen=True, slots=True)
class _Survey:
    """A second look at who beats: `beats` were read when it began, those unmoved when `due` are dead."""

    beats: dict[int, int]
    due: float
    silent_seconds: float


class SilenceWatch:
    """Belongs to the watching thread. Methods may raise what the store raises when it is gone."""

    def __init__(self, board: Board, rank: int, world_size: int, limits: WatchLimits) -> None:
        self._board = board
        self._rank = rank
        self._world_size = world_size
        self._limits = limits
        self._neighbour = self._after(rank)
        self._neighbour_beat = -1
        self._silent_seconds = 0.0
        self._last_look = time.monotonic()
        self._joined_by = time.monotonic() + limits.join_seconds
        self._survey: _Survey | None = None

    def look_at_neighbour(self) -> Lost | None:
        """One look, a heartbeat after the last. Lost is a neighbour that never joined."""
        # Time in which this process was itself suspended does not count as another's silence.
        now = time.monotonic()
        elapsed = min(now - self._last_look, 2 * self._limits.heartbeat_seconds)
        self._last_look = now
        if self._neighbour == self._rank:
            return None
        status = self._board.status(self._neighbour)
        if status is None:
            if now > self._joined_by:
                return Lost({self._neighbour: None}, f"waited {self._limits.join_seconds:.0f} s")
            return None
        if status.state is RankState.FINISHED:
            self._neighbour = self._after(self._neighbour)
            self._neighbour_beat, self._silent_seconds = -1, 0.0
        elif status.beat != self._neighbour_beat:
            self._neighbour_beat, self._silent_seconds = status.beat, 0.0
        else:
            self._silent_seconds += elapsed
            if self._silent_seconds > self._limits.silence_seconds and self._survey is None:
                self.begin_survey(self.others(), 5 * self._limits.heartbeat_seconds)
        return None

    def others(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank != self._rank]

    def begin_survey(self, ranks: Iterable[int], seconds: float) -> None:
        """Read the beats of `ranks` now, to compare them in `seconds`."""
        statuses = {rank: self._board.status(rank) for rank in ranks}
        beats = {
            rank: status.beat
            for rank, status in statuses.items()
            if status is not None and status.state is RankState.RUNNING
        }
        self._survey = _Survey(beats, time.monotonic() + seconds, max(seconds, self._silent_seconds))

    @property
    def is_surveying(self) -> bool:
        return self._survey is not None

    def finish_survey(self) -> Lost | None:
        """Once it is due: who has not moved since it began."""
        survey = self._survey
        if survey is None or time.monotonic() < survey.due:
            return None
        self._survey = None
        dead: dict[int, RankStatus | None] = {}
        for rank, beat in survey.beats.items():
            status = self._board.status(rank)
            if status is not None and status.beat == beat and status.state is RankState.RUNNING:
                dead[rank] = status
        return Lost(dead, f"no heartbeat for {survey.silent_seconds:.0f} s") if dead else None

    def _after(self, rank: int) -> int:
        return (rank + 1) % self._world_size
