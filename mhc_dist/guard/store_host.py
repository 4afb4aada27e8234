"""The rank that hosts the run's store: when the store is gone or silent, so is its host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from mhc_dist.guard import describe
from mhc_dist.guard.board import Board, RankState, RankStatus
from mhc_dist.guard.ending import Ending, exit_now, wait_until_gone
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import ProcessName, is_alive
from mhc_dist.guard.own_status import OwnStatus

DEATH_SECONDS = 2.0


class StoreHost:
    """What is known of the rank whose process hosts the store; `rank` is None if that is none of the ranks.

    Its last status is kept: once the store is gone, nothing more can be read.
    """

    def __init__(self, rank: int | None, board: Board, own: OwnStatus, ending: Ending) -> None:
        self._rank = rank
        self._board = board
        self._own = own
        self._ending = ending
        self._status: RankStatus | None = None

    def refresh(self) -> None:
        if self._rank is not None and self._rank != self._own.rank:
            self._status = self._board.status(self._rank) or self._status

    @property
    def is_finished(self) -> bool:
        return self._status is not None and self._status.state is RankState.FINISHED

    def end_because_lost(self, error: Exception, local_processes: Mapping[int, ProcessName]) -> NoReturn:
        """The store raised `error`. `local_processes`: other ranks of this machine."""
        if self._rank is None:
            self._end(f"the run's key-value store is gone ({describe.error_message(error)})")
        # A dying process closes its sockets before it counts as gone.
        status = self._status
        process = status.process if status is not None else None
        if process is not None and process.pid_space == self._own.process.pid_space:
            wait_until_gone(local_processes.get(self._rank), DEATH_SECONDS)
            reason = "its process is gone" if not is_alive(process) else "its store is gone"
        else:
            reason = f"its store is gone ({describe.error_message(error)})"
        if status is not None and status.state is not RankState.RUNNING:
            reason = f"{status.state.value}; {reason}"
        self._end(describe.lost_rank(self._rank, status, reason))

    def end_because_silent(self, limit_seconds: float) -> NoReturn:
        """The store has neither answered nor failed for `limit_seconds`."""
        seconds = f"{limit_seconds:.0f} s"
        if self._rank is None or self._rank == self._own.rank:
            self._end(f"the run's key-value store has not answered for {seconds}")
        self._end(describe.lost_rank(self._rank, self._status, f"its store has not answered for {seconds}"))

    def _end(self, text: str) -> NoReturn:
        self._ending.say(text, ExitCode.PEER_DIED)
        self._ending.leave_word(text, ExitCode.PEER_DIED)
        exit_now(ExitCode.PEER_DIED)
