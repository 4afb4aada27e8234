"""End the run, with the reason, when it cannot go on: a dead rank, a failed one, or one that is stuck.

A collective whose partner died waits for minutes, in C++, where no Python exception reaches it. So each
rank runs a thread that watches the others and ends its own process with `os._exit`:

* ranks of the same machine by their process, five times a second;
* ranks of other machines by their heartbeat in the run's key-value store. A rank reads only its next
  neighbour's (and that of the rank which hosts the store), and posts what it finds for all;
* itself: an action that takes longer than allowed ends the run with a dump of what every rank does.

A rank that dies often takes others with it: their collectives fail, the launcher sends them SIGTERM. Both
are held back for a moment (`report_failure`, `SignalInbox`) until it is known whether someone died first,
so that the message names the cause and not a victim.

Here are the thread and its decisions; what it looks at and how it ends is in `silence.py`, `store_host.py`,
`stop_request.py` and `ending.py`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from mhc_dist.guard import describe
from mhc_dist.guard.board import Board, KeyValueStore, Notice, NoticeKind, RankState
from mhc_dist.guard.ending import CLOSE_SECONDS, Ending, exit_now
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import ProcessName, is_alive, this_process
from mhc_dist.guard.own_status import OwnStatus
from mhc_dist.guard.signals import SignalInbox
from mhc_dist.guard.silence import Lost, SilenceWatch
from mhc_dist.guard.stop import StopKind
from mhc_dist.guard.stop_request import StopRequest
from mhc_dist.guard.store_host import StoreHost
from mhc_dist.guard.timed_store import TimedStore
from mhc_dist.guard.watch_limits import WatchLimits

POLL_SECONDS = 0.2
LOCAL_FAILURE_GRACE_SECONDS = 2.0
REMOTE_FAILURE_GRACE_SECONDS = 5.0
"""Longer than a few heartbeats: another machine's death shows only by their absence."""

ECHOES = (RuntimeError, OSError)
"""What communication raises: perhaps the consequence of another rank's death."""

# What TCPStore and FileStore raise when their other end is gone.
STORE_ERRORS = (RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    due: float


class PeerWatch:
    """Watches the ranks of a run from inside one of them. A context manager:

        with PeerWatch(TCPStore(host, port, is_master=False), rank, world_size, inbox=inbox) as watch:
            ... watch.report_action(action) ...

    Leaving the block by an exception reports it to the others (`report_failure`), leaving it normally says
    that this rank is finished (`close`).

    Args:
        store: a client of the run's store that nobody else uses.
        rank, world_size: of this process.
        inbox: stop signals of this process; without one they keep their usual effect.
        store_rank: whose process hosts the store; None if that is none of the ranks.
        process: this process's name; tests pretend to be on other machines with it.
        on_end: called with code and reason when this process is ended because another one died or is stuck,
            on a thread of its own that gets half a second. A rank that fails by itself speaks for itself.
    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        *,
        inbox: SignalInbox | None = None,
        store_rank: int | None = 0,
        limits: WatchLimits | None = None,
        process: ProcessName | None = None,
        on_end: Callable[[ExitCode, str], object] | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._inbox = inbox
        self._limits = limits or WatchLimits()
        process = process or this_process()
        self._store = TimedStore(store)
        self._board = Board(self._store, rank, process)
        self._own = OwnStatus(rank, process, self._limits.join_seconds)
        self._ending = Ending(self._board, self._own, world_size, store_rank, on_end)
        self._store_host = StoreHost(store_rank, self._board, self._own, self._ending)
        self._silence = SilenceWatch(self._board, rank, world_size, self._limits)
        self._stop = StopRequest(self._limits.stop_seconds)

        # Written by the main thread, read by the watching one. Assignments are atomic.
        self._error: BaseException | None = None
        self._closing = False

        # Used by the watching thread alone.
        self._next_beat = 0.0
        self._locals: dict[int, ProcessName] = {}
        self._failure: _Failure | None = None

        self._watching = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._backstop = threading.Thread(target=self._watch_store, name="peer-watch-store", daemon=True)
        self._over = threading.Event()

    # ---- for the main thread ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._board.join(self._own.next(RankState.RUNNING))
        self._watching.start()
        self._backstop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        in_order = (None, ExitCode.OK, ExitCode.STOPPED)
        if error is None or (isinstance(error, SystemExit) and error.code in in_order):
            self.close()
        else:
            self.report_failure(error)

    def report_action(self, action: object, may_take_seconds: float | None = None) -> None:
        """Say what this rank does from now on. Costs well under a microsecond: call it for every action.

        `str(action)` is taken later, on the watching thread. `may_take_seconds` replaces the usual limit
        for this one action (compiling, writing a checkpoint).
        """
        limit = self._limits.action_seconds if may_take_seconds is None else may_take_seconds
        self._own.begin(action, limit)

    @property
    def current_action(self) -> tuple[str, float]:
        """What this rank does, and for how many seconds it has done so."""
        current = self._own.current
        return str(current.action), current.seconds

    @property
    def stop_reason(self) -> str | None:
        """Why the run should end soon (for example `SIGTERM on rank 3`), or None. The same on all ranks,
        but not at the same instant: agree on the step to stop at before acting on it."""
        return self._stop.reason

    @property
    def stop_kind(self) -> StopKind | None:
        """What kind of end `stop_reason` asks for."""
        reason = self._stop.reason
        return None if reason is None else StopKind.of(signal.Signals[reason.partition(" ")[0]])

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one is about to exit because of `error`.

        Returns after they have read it, or a few seconds at most; the caller then exits with its own code.
        If `error` turns out to be the consequence of another rank's death, the process is ended here, with
        a line that names that rank.
        """
        self._error = error
        self._over.wait(REMOTE_FAILURE_GRACE_SECONDS + CLOSE_SECONDS)

    def close(self) -> None:
        """This rank has done its part: it may now disappear without being missed."""
        self._closing = True
        self._over.wait(2 * CLOSE_SECONDS)

    # ---- the watching thread ---------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not self._tick():
                pass
        except STORE_ERRORS as error:
            if self._ending.exit_code is not None:
                exit_now(self._ending.exit_code)
            if not self._closing and not self._store_host.is_finished:
                self._store_host.end_because_lost(error, self._locals)
        finally:
            self._over.set()

    def _tick(self) -> bool:
        """One look around; True when there is nothing left to watch."""
        caught = self._pause()
        if caught is not None:
            self._on_signal(caught)
        self._check_local_processes()
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._limits.heartbeat_seconds
            self._exchange_heartbeats()
        self._check_survey()
        self._check_stop()
        if self._closing:
            self._ending.finished()
            return True
        if self._error is not None:
            return self._on_own_failure(self._error)
        self._check_own_action()
        return False

    def _pause(self) -> signal.Signals | None:
        if self._inbox is not None:
            return self._inbox.wait(POLL_SECONDS)
        time.sleep(POLL_SECONDS)
        return None

    # -- others on this machine

    def _check_local_processes(self) -> None:
        gone = [rank for rank, process in self._locals.items() if not is_alive(process)]
        if not gone:
            return
        # Whatever they had to say they said before they went.
        self._read_notices()
        statuses = {rank: self._board.status(rank) for rank in gone}
        for rank in gone:
            del self._locals[rank]
        died = {
            rank: status
            for rank, status in statuses.items()
            if status is None or status.state is RankState.RUNNING
        }
        if died:
            self._end_because_of(Lost(died, "its process is gone"))

    # -- others anywhere

    def _exchange_heartbeats(self) -> None:
        self._board.publish(self._own.next(RankState.RUNNING))
        self._locals.update(self._board.new_locals())
        self._read_notices()
        self._store_host.refresh()
        lost = self._silence.look_at_neighbour()
        if lost is not None:
            self._end_because_of(lost)

    def _check_survey(self) -> None:
        lost = self._silence.finish_survey()
        if lost is not None:
            self._read_notices()
            self._end_because_of(lost)

    def _read_notices(self) -> None:
        for notice in self._board.new_notices():
            match notice.kind:
                case NoticeKind.STOP:
                    self._stop.accept(notice.text)
                case NoticeKind.FAILED if self._error is not None and not isinstance(self._error, ECHOES):
                    # Ranks that find the same mistake find it at once, and each ends with its own code.
                    continue
                case NoticeKind.DIED | NoticeKind.FAILED | NoticeKind.STUCK:
                    self._end(notice)

    # -- this rank

    def _check_own_action(self) -> None:
        current = self._own.current
        seconds = current.seconds
        if seconds <= current.limit_seconds:
            return
        self._read_notices()
        self._board.publish(self._own.next(RankState.RUNNING))
        statuses = {rank: self._board.status(rank) for rank in range(self._world_size)}
        text = (
            f"no progress: rank {self._rank} has been in {current.action} for {seconds:.1f} s,"
            f" {current.limit_seconds:.1f} s are allowed. What every rank is doing:\n"
            + describe.dump(statuses)
        )
        self._post_and_end(Notice(NoticeKind.STUCK, self._rank, (self._rank,), text))

    def _on_own_failure(self, error: BaseException) -> bool:
        if self._failure is None:
            self._failure = self._hold_back(error)
        if time.monotonic() < self._failure.due or self._silence.is_surveying:
            return False
        self._read_notices()
        self._ending.failed(self._failure.message)
        return True

    def _hold_back(self, error: BaseException) -> _Failure:
        """Errors of a kind that communication raises may be an echo of another rank's death."""
        message = describe.error_message(error)
        if not isinstance(error, ECHOES) or self._world_size == 1:
            return _Failure(message, due=0.0)
        elsewhere = [rank for rank in self._silence.others() if rank not in self._locals]
        if not elsewhere:
            return _Failure(message, time.monotonic() + LOCAL_FAILURE_GRACE_SECONDS)
        self._silence.begin_survey(elsewhere, REMOTE_FAILURE_GRACE_SECONDS)
        return _Failure(message, time.monotonic() + REMOTE_FAILURE_GRACE_SECONDS)

    # -- requests to stop

    def _on_signal(self, caught: signal.Signals) -> None:
        if not self._stop.note(caught) and caught == signal.SIGINT:
            self._ending.stopped(f"stopped at once: {caught.name} after an earlier request to stop")

    def _check_stop(self) -> None:
        caught = self._stop.take_due()
        if caught is not None:
            text = f"{caught.name} on rank {self._rank}"
            self._board.post(Notice(NoticeKind.STOP, self._rank, (self._rank,), text))
            self._read_notices()
        if self._stop.is_overdue:
            self._ending.stopped(
                f"stopped ({self._stop.reason}), but not in order within {self._limits.stop_seconds:.0f} s"
            )

    # -- endings

    def _end_because_of(self, lost: Lost) -> NoReturn:
        dead = sorted(lost.statuses.items())
        text = "; ".join(describe.lost_rank(rank, status, lost.reason) for rank, status in dead)
        self._post_and_end(Notice(NoticeKind.DIED, self._rank, tuple(rank for rank, _ in dead), text))

    def _post_and_end(self, notice: Notice) -> NoReturn:
        self._board.post(notice)
        # If another rank posted first, all follow that one.
        self._read_notices()
        self._end(notice)

    def _end(self, notice: Notice) -> NoReturn:
        self._ending.because_of(notice, self._locals.get(notice.author))

    # ---- the backstop thread ---------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """A store whose machine lost power neither answers nor fails, and the watching thread waits in it."""
        while not self._over.wait(1.0):
            since = self._store.busy_since
            if since is not None and time.monotonic() - since > self._limits.silence_seconds:
                self._store_host.end_because_silent(self._limits.silence_seconds)
