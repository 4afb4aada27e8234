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
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from mhc_dist.guard import describe
from mhc_dist.guard.board import Board, KeyValueStore, Notice, NoticeKind, RankState, RankStatus
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import ProcessName, is_alive, this_process
from mhc_dist.guard.signals import SignalInbox
from mhc_dist.guard.stop import StopKind
from mhc_dist.guard.timed_store import TimedStore

POLL_SECONDS = 0.2
STOP_GRACE_SECONDS = 2.0
"""The launcher sends SIGTERM about a second after it saw a rank die: we have seen it too by then."""
LOCAL_FAILURE_GRACE_SECONDS = 2.0
REMOTE_FAILURE_GRACE_SECONDS = 5.0
"""Longer than a few heartbeats: another machine's death shows only by their absence."""
LINGER_SECONDS = 3.0
CLOSE_SECONDS = 10.0

ECHOES = (RuntimeError, OSError)
"""What communication raises: perhaps the consequence of another rank's death."""

# What TCPStore and FileStore raise when their other end is gone.
STORE_ERRORS = (RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """How long what may last, in seconds."""

    action_seconds: float = 60.0
    """Longest time one reported action may take."""
    silence_seconds: float = 30.0
    """Longest silence of a rank on another machine, or of the store itself."""
    join_seconds: float = 300.0
    """Longest time until all ranks have joined."""
    heartbeat_seconds: float = 0.5
    stop_seconds: float = 20.0
    """Time to end in order after a request to stop. DeepSpeed's launcher kills after 30."""


@dataclass(frozen=True, slots=True)
class _CurrentAction:
    action: object
    since: float
    limit_seconds: float


@dataclass(frozen=True, slots=True)
class _Survey:
    """A second look at who beats: `beats` were read when it began, those unmoved when `due` are dead."""

    beats: dict[int, int]
    due: float
    silent_seconds: float


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
        self._on_end = on_end
        self._rank = rank
        self._world_size = world_size
        self._inbox = inbox
        self._store_rank = store_rank
        self._limits = limits or WatchLimits()
        self._process = process or this_process()
        self._store = TimedStore(store)
        self._board = Board(self._store, rank, self._process)

        # Written by the main thread, read by the watching one. Assignments are atomic.
        self._current = _CurrentAction("start", time.monotonic(), self._limits.join_seconds)
        self._error: BaseException | None = None
        self._closing = False
        # Written by the watching thread.
        self._stop_reason: str | None = None

        # Used by the watching thread alone.
        self._beat = 0
        self._next_beat = 0.0
        self._locals: dict[int, ProcessName] = {}
        self._neighbour = rank
        self._neighbour_beat = -1
        self._silent_seconds = 0.0
        self._last_look = time.monotonic()
        self._num_joined = 0
        self._joined_by = time.monotonic() + self._limits.join_seconds
        self._store_rank_status: RankStatus | None = None
        self._survey: _Survey | None = None
        self._failure: _Failure | None = None
        self._pending_stop: tuple[signal.Signals, float] | None = None
        self._stop_deadline = math.inf
        self._exit_code: ExitCode | None = None
        """Set once the reason has been printed: the store may go away after that."""

        self._watching = threading.Thread(target=self._watch, name="peer-watch", daemon=True)
        self._backstop = threading.Thread(target=self._watch_store, name="peer-watch-store", daemon=True)
        self._over = threading.Event()

    # ---- for the main thread ---------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._board.join(self._status(RankState.RUNNING))
        self._neighbour = self._next_neighbour(self._rank)
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
        self._current = _CurrentAction(action, time.monotonic(), limit)

    @property
    def current_action(self) -> tuple[str, float]:
        """What this rank does, and for how many seconds it has done so."""
        current = self._current
        return str(current.action), time.monotonic() - current.since

    @property
    def stop_reason(self) -> str | None:
        """Why the run should end soon (for example `SIGTERM on rank 3`), or None. The same on all ranks,
        but not at the same instant: agree on the step to stop at before acting on it."""
        return self._stop_reason

    @property
    def stop_kind(self) -> StopKind | None:
        """What kind of end `stop_reason` asks for."""
        reason = self._stop_reason
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
            if self._exit_code is not None:
                _exit(self._exit_code)
            self._on_store_lost(error)
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
            self._leave()
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

    def _status(self, state: RankState) -> RankStatus:
        current = self._current
        since = time.time() - (time.monotonic() - current.since)
        self._beat += 1
        return RankStatus(self._rank, self._process, state, self._beat, str(current.action), since)

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
            self._end_because_of_dead(died, "its process is gone")

    # -- others anywhere

    def _exchange_heartbeats(self) -> None:
        self._board.publish(self._status(RankState.RUNNING))
        self._locals.update(self._board.new_locals())
        self._read_notices()
        if self._store_rank is not None and self._store_rank != self._rank:
            self._store_rank_status = self._board.status(self._store_rank) or self._store_rank_status
        self._look_at_neighbour()

    def _read_notices(self) -> None:
        for notice in self._board.new_notices():
            match notice.kind:
                case NoticeKind.STOP:
                    self._accept_stop(notice.text)
                case NoticeKind.FAILED if self._error is not None and not isinstance(self._error, ECHOES):
                    # Ranks that find the same mistake find it at once, and each ends with its own code.
                    continue
                case NoticeKind.DIED | NoticeKind.FAILED | NoticeKind.STUCK:
                    self._end(notice)

    def _look_at_neighbour(self) -> None:
        # Time in which this process was itself suspended does not count as another's silence.
        now = time.monotonic()
        elapsed = min(now - self._last_look, 2 * self._limits.heartbeat_seconds)
        self._last_look = now
        if self._neighbour == self._rank:
            return
        status = self._board.status(self._neighbour)
        if status is None:
            if now > self._joined_by:
                reason = f"waited {self._limits.join_seconds:.0f} s"
                self._end_because_of_dead({self._neighbour: None}, reason)
            return
        if status.state is RankState.FINISHED:
            self._neighbour = self._next_neighbour(self._neighbour)
            self._neighbour_beat, self._silent_seconds = -1, 0.0
        elif status.beat != self._neighbour_beat:
            self._neighbour_beat, self._silent_seconds = status.beat, 0.0
        else:
            self._silent_seconds += elapsed
            if self._silent_seconds > self._limits.silence_seconds and self._survey is None:
                # A whole machine may be gone: look at everybody, once.
                self._begin_survey(self._others(), 5 * self._limits.heartbeat_seconds)

    def _next_neighbour(self, rank: int) -> int:
        return (rank + 1) % self._world_size

    def _others(self) -> list[int]:
        return [rank for rank in range(self._world_size) if rank != self._rank]

    def _begin_survey(self, ranks: Iterable[int], seconds: float) -> None:
        statuses = {rank: self._board.status(rank) for rank in ranks}
        beats = {
            rank: status.beat
            for rank, status in statuses.items()
            if status is not None and status.state is RankState.RUNNING
        }
        self._survey = _Survey(beats, time.monotonic() + seconds, max(seconds, self._silent_seconds))

    def _check_survey(self) -> None:
        survey = self._survey
        if survey is None or time.monotonic() < survey.due:
            return
        self._survey = None
        dead: dict[int, RankStatus | None] = {}
        for rank, beat in survey.beats.items():
            status = self._board.status(rank)
            if status is not None and status.beat == beat and status.state is RankState.RUNNING:
                dead[rank] = status
        if dead:
            self._read_notices()
            self._end_because_of_dead(dead, f"no heartbeat for {survey.silent_seconds:.0f} s")

    # -- this rank

    def _check_own_action(self) -> None:
        current = self._current
        seconds = time.monotonic() - current.since
        if seconds <= current.limit_seconds:
            return
        self._read_notices()
        self._board.publish(self._status(RankState.RUNNING))
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
        if time.monotonic() < self._failure.due or self._survey is not None:
            return False
        self._read_notices()
        status = self._status(RankState.FAILED)
        text = describe.failed_rank(status, self._failure.message)
        self._board.post(Notice(NoticeKind.FAILED, self._rank, (self._rank,), text))
        self._board.publish(status)
        self._board.count_leaving()
        self._wait_until_all_leave(self._world_size, LINGER_SECONDS)
        return True

    def _hold_back(self, error: BaseException) -> _Failure:
        """Errors of a kind that communication raises may be an echo of another rank's death."""
        message = describe.error_message(error)
        if not isinstance(error, ECHOES) or self._world_size == 1:
            return _Failure(message, due=0.0)
        elsewhere = [rank for rank in self._others() if rank not in self._locals]
        if not elsewhere:
            return _Failure(message, time.monotonic() + LOCAL_FAILURE_GRACE_SECONDS)
        self._begin_survey(elsewhere, REMOTE_FAILURE_GRACE_SECONDS)
        return _Failure(message, time.monotonic() + REMOTE_FAILURE_GRACE_SECONDS)

    # -- requests to stop

    def _on_signal(self, caught: signal.Signals) -> None:
        if self._pending_stop is None and self._stop_reason is None:
            self._pending_stop = (caught, time.monotonic() + STOP_GRACE_SECONDS)
        elif caught == signal.SIGINT:
            self._end_stopped(f"stopped at once: {caught.name} after an earlier request to stop")

    def _check_stop(self) -> None:
        now = time.monotonic()
        if self._pending_stop is not None and now >= self._pending_stop[1]:
            caught, _ = self._pending_stop
            self._pending_stop = None
            if self._stop_reason is None:
                text = f"{caught.name} on rank {self._rank}"
                self._board.post(Notice(NoticeKind.STOP, self._rank, (self._rank,), text))
                self._read_notices()
        if now >= self._stop_deadline:
            self._end_stopped(
                f"stopped ({self._stop_reason}), but not in order within {self._limits.stop_seconds:.0f} s"
            )

    def _accept_stop(self, reason: str) -> None:
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stop_deadline = time.monotonic() + self._limits.stop_seconds

    # -- endings

    def _end_because_of_dead(self, dead: dict[int, RankStatus | None], reason: str) -> NoReturn:
        text = "; ".join(describe.lost_rank(rank, status, reason) for rank, status in sorted(dead.items()))
        self._post_and_end(Notice(NoticeKind.DIED, self._rank, tuple(sorted(dead)), text))

    def _post_and_end(self, notice: Notice) -> NoReturn:
        self._board.post(notice)
        # If another rank posted first, all follow that one.
        self._read_notices()
        self._end(notice)

    def _end(self, notice: Notice) -> NoReturn:
        """Say why, let the others read it, and end the process."""
        code = ExitCode.STUCK if notice.kind is NoticeKind.STUCK else ExitCode.PEER_DIED
        text = notice.text
        if notice.kind is NoticeKind.STUCK and notice.author != self._rank:
            # The dump is printed once, by its author.
            text = text.partition(" What every rank")[0]
        self._say(text, code)
        if notice.kind is not NoticeKind.FAILED:
            self._leave_word(text.partition("\n")[0].rstrip(":"), code)
        self._board.publish(self._status(RankState.ENDING))
        self._board.count_leaving()
        if self._rank == self._store_rank:
            num_dead = len(notice.ranks) if notice.kind is NoticeKind.DIED else 0
            self._wait_until_all_leave(self._world_size - num_dead, LINGER_SECONDS)
        if notice.kind is NoticeKind.FAILED:
            # The launcher reports the exit code of the first process that ends: let it be the cause.
            self._wait_until_gone(notice.author, LINGER_SECONDS)
        _exit(code)

    def _end_stopped(self, text: str) -> NoReturn:
        self._say(text, ExitCode.STOPPED)
        self._board.publish(self._status(RankState.ENDING))
        self._board.count_leaving()
        if self._rank == self._store_rank:
            self._wait_until_all_leave(self._world_size, LINGER_SECONDS)
        _exit(ExitCode.STOPPED)

    def _on_store_lost(self, error: Exception) -> None:
        status = self._store_rank_status
        if self._closing or (status is not None and status.state is RankState.FINISHED):
            return
        host = self._store_rank
        if host is None:
            self._say(
                f"the run's key-value store is gone ({describe.error_message(error)})", ExitCode.PEER_DIED
            )
            _exit(ExitCode.PEER_DIED)
        # A dying process closes its sockets before it counts as gone.
        process = status.process if status is not None else None
        if process is not None and process.pid_space == self._process.pid_space:
            self._wait_until_gone(host, LOCAL_FAILURE_GRACE_SECONDS)
            reason = "its process is gone" if not is_alive(process) else "its store is gone"
        else:
            reason = f"its store is gone ({describe.error_message(error)})"
        if status is not None and status.state is not RankState.RUNNING:
            reason = f"{status.state.value}; {reason}"
        text = describe.lost_rank(host, status, reason)
        self._say(text, ExitCode.PEER_DIED)
        self._leave_word(text, ExitCode.PEER_DIED)
        _exit(ExitCode.PEER_DIED)

    def _leave(self) -> None:
        self._board.publish(self._status(RankState.FINISHED))
        self._board.count_leaving()
        if self._rank == self._store_rank:
            self._wait_until_all_leave(self._world_size, CLOSE_SECONDS)

    def _wait_until_all_leave(self, num_ranks: int, limit_seconds: float) -> None:
        deadline = time.monotonic() + limit_seconds
        while self._board.num_leaving() < num_ranks and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)

    def _wait_until_gone(self, rank: int, limit_seconds: float) -> None:
        process = self._locals.get(rank)
        deadline = time.monotonic() + limit_seconds
        while process is not None and is_alive(process) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)

    def _leave_word(self, text: str, code: ExitCode) -> None:
        if self._on_end is not None:
            # What it writes to may hang, with the file system of a node that died.
            telling = threading.Thread(target=self._on_end, args=(code, text), daemon=True)
            telling.start()
            telling.join(0.5)

    def _say(self, text: str, code: ExitCode) -> None:
        self._exit_code = code
        current = self._current
        doing = f"This rank was in {current.action} for {time.monotonic() - current.since:.1f} s."
        end = f"Ending with exit code {code.value} ({code.name})."
        parts = text.split("\n", 1)
        line = f"[rank {self._rank}] {parts[0]}{'' if parts[0].endswith((':', '.')) else '.'} {doing} {end}"
        if len(parts) == 2:
            line = f"[rank {self._rank}] {text}\n[rank {self._rank}] {doing} {end}"
        # One system call: lines of several ranks on one terminal stay whole, and no lock is needed that the
        # main thread may hold.
        os.write(2, (line + "\n").encode())

    # ---- the backstop thread ---------------------------------------------------------------------------

    def _watch_store(self) -> None:
        """A store whose machine lost power neither answers nor fails, and the watching thread waits in it."""
        while not self._over.wait(1.0):
            since = self._store.busy_since
            if since is not None and time.monotonic() - since > self._limits.silence_seconds:
                self._on_store_silent()

    def _on_store_silent(self) -> NoReturn:
        seconds = f"{self._limits.silence_seconds:.0f} s"
        host = self._store_rank
        if host is None or host == self._rank:
            text = f"the run's key-value store has not answered for {seconds}"
        else:
            text = describe.lost_rank(
                host, self._store_rank_status, f"its store has not answered for {seconds}"
            )
        self._say(text, ExitCode.PEER_DIED)
        self._leave_word(text, ExitCode.PEER_DIED)
        _exit(ExitCode.PEER_DIED)


def _exit(code: ExitCode) -> NoReturn:
    """Leave at once, whatever other threads do. Buffered output is given half a second."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    # On a thread: the main thread may hold the buffers' locks and wait for a dead reader.
    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(0.5)
    os._exit(code)
