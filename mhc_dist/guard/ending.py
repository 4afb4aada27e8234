"""How a rank ends: it says why, lets the others read it, and leaves, whatever its other threads do."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from mhc_dist.guard import describe
from mhc_dist.guard.board import Board, Notice, NoticeKind, RankState
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import ProcessName, is_alive
from mhc_dist.guard.own_status import OwnStatus

POLL_SECONDS = 0.05
LINGER_SECONDS = 3.0
CLOSE_SECONDS = 10.0


class Ending:
    """The ways out of one rank's process. The rank that hosts the store is the last to leave.

    Args:
        board, own: where and what this rank tells the others.
        store_rank: whose process hosts the store; None if that is none of the ranks.
        on_end: called with code and reason by `leave_word`.
    """

    def __init__(
        self,
        board: Board,
        own: OwnStatus,
        world_size: int,
        store_rank: int | None,
        on_end: Callable[[ExitCode, str], object] | None,
    ) -> None:
        self._board = board
        self._own = own
        self._world_size = world_size
        self._store_rank = store_rank
        self._on_end = on_end
        self.exit_code: ExitCode | None = None
        """Set once the reason has been printed: the store may go away after that."""

    def finished(self) -> None:
        """Leave in order: this rank will not be missed."""
        self._board.publish(self._own.next(RankState.FINISHED))
        self._board.count_leaving()
        if self._own.rank == self._store_rank:
            self._wait_until_all_leave(self._world_size, CLOSE_SECONDS)

    def failed(self, message: str) -> None:
        """Tell the others of this rank's own error; the caller exits."""
        status = self._own.next(RankState.FAILED)
        text = describe.failed_rank(status, message)
        self._board.post(Notice(NoticeKind.FAILED, self._own.rank, (self._own.rank,), text))
        self._board.publish(status)
        self._board.count_leaving()
        self._wait_until_all_leave(self._world_size, LINGER_SECONDS)

    def because_of(self, notice: Notice, author: ProcessName | None) -> NoReturn:
        """Say why, let the others read it, and end the process.

        `author` is the process of the rank that posted the notice, if it runs on this machine.
        """
        code = ExitCode.STUCK if notice.kind is NoticeKind.STUCK else ExitCode.PEER_DIED
        text = notice.text
        if notice.kind is NoticeKind.STUCK and notice.author != self._own.rank:
            # The dump is printed once, by its author.
            text = text.partition(" What every rank")[0]
        self.say(text, code)
        if notice.kind is not NoticeKind.FAILED:
            self.leave_word(text.partition("\n")[0].rstrip(":"), code)
        num_dead = len(notice.ranks) if notice.kind is NoticeKind.DIED else 0
        self._let_others_read(self._world_size - num_dead)
        if notice.kind is NoticeKind.FAILED:
            # The launcher reports the exit code of the first process that ends: let it be the cause.
            wait_until_gone(author, LINGER_SECONDS)
        exit_now(code)

    def stopped(self, text: str) -> NoReturn:
        """End without having stopped in order."""
        self.say(text, ExitCode.STOPPED)
        self._let_others_read(self._world_size)
        exit_now(ExitCode.STOPPED)

    def leave_word(self, text: str, code: ExitCode) -> None:
        if self._on_end is not None:
            # What it writes to may hang, with the file system of a node that died.
            telling = threading.Thread(target=self._on_end, args=(code, text), daemon=True)
            telling.start()
            telling.join(0.5)

    def say(self, text: str, code: ExitCode) -> None:
        """Print the reason, what this rank was doing, and the exit code."""
        self.exit_code = code
        rank, current = self._own.rank, self._own.current
        doing = f"This rank was in {current.action} for {current.seconds:.1f} s."
        end = f"Ending with exit code {code.value} ({code.name})."
        parts = text.split("\n", 1)
        line = f"[rank {rank}] {parts[0]}{'' if parts[0].endswith((':', '.')) else '.'} {doing} {end}"
        if len(parts) == 2:
            line = f"[rank {rank}] {text}\n[rank {rank}] {doing} {end}"
        # One system call: lines of several ranks on one terminal stay whole, and no lock is needed that the
        # main thread may hold.
        os.write(2, (line + "\n").encode())

    def _let_others_read(self, num_ranks: int) -> None:
        self._board.publish(self._own.next(RankState.ENDING))
        self._board.count_leaving()
        if self._own.rank == self._store_rank:
            self._wait_until_all_leave(num_ranks, LINGER_SECONDS)

    def _wait_until_all_leave(self, num_ranks: int, limit_seconds: float) -> None:
        deadline = time.monotonic() + limit_seconds
        while self._board.num_leaving() < num_ranks and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def wait_until_gone(process: ProcessName | None, limit_seconds: float) -> None:
    deadline = time.monotonic() + limit_seconds
    while process is not None and is_alive(process) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def exit_now(code: ExitCode) -> NoReturn:
    """Leave at once, whatever other threads do. Buffered output is given half a second."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    # On a thread: the main thread may hold the buffers' locks and wait for a dead reader.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(0.5)
    os._exit(code)
