"""One command and all its descendants: started together, told to stop together, none left behind.

The command gets a process group of its own, so that a Ctrl-C reaches this process alone and is passed on in
an orderly way: first to the ranks, which may finish what they are doing; to everybody when they take too long
or when the user insists.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import psutil

STOP_SECONDS = 90.0
"""How long ranks may take to finish after a request to stop, where nobody says otherwise."""

STOP_MARGIN_SECONDS = 30.0
"""What is added to checkpoint.stop_seconds, the time in which ranks end by themselves."""

OVER_SECONDS = 20.0
"""How long a command may outlive its run: the ranks of the other nodes end within that time."""

LINGER_SECONDS = 10.0
"""How long descendants may outlive the command before they are killed."""

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """`exit_code` as a shell would show it; `stopped_by` is the signal that asked this process to stop."""

    exit_code: int
    stopped_by: signal.Signals | None


class _StopRequests:
    """Signals that arrived, noted by the handler and acted on by the waiting loop."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))


def run_group(
    command: Sequence[str],
    environment: dict[str, str],
    is_rank: Callable[[Sequence[str]], bool],
    *,
    ask_elsewhere: Callable[[signal.Signals], bool] | None = None,
    is_over: Callable[[], bool] = lambda: False,
    stop_seconds: float = STOP_SECONDS,
) -> Ended:
    """Run `command` to its end with this process's output.

    Args:
        is_rank: knows a rank by its command line.
        ask_elsewhere: asks ranks on other hosts to stop, by a signal; False when there are none.
        is_over: whether the run itself has ended. A command that outlives it by `OVER_SECONDS`, waiting for a
            node that is gone, is ended.
        stop_seconds: how long ranks may take to finish after a request to stop.
    """
    requests = _StopRequests()
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    previous = {number: signal.signal(number, requests.note) for number in caught}
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)

        def ask_to_stop(received: signal.Signals) -> None:
            # A scheduler's warning stays one: ranks end with another code then.
            number = signal.SIGUSR1 if received == signal.SIGUSR1 else signal.SIGTERM
            if ask_elsewhere is None or not ask_elsewhere(number):
                _ask_to_stop(process.pid, is_rank, number)

        _wait(process, requests, ask_to_stop, is_over, stop_seconds)
        _end_group(process.pid)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = process.returncode
    return Ended(code if code >= 0 else 128 - code, requests.received[0] if requests.received else None)


def _wait(
    process: subprocess.Popen[bytes],
    requests: _StopRequests,
    ask_to_stop: Callable[[signal.Signals], None],
    is_over: Callable[[], bool],
    stop_seconds: float,
) -> None:
    """Until the command ends. The first request goes to the ranks, the second one ends everything."""
    deadline: float | None = None
    over_since: float | None = None
    while process.poll() is None:
        if requests.received and deadline is None:
            deadline = time.monotonic() + stop_seconds
            ask_to_stop(requests.received[0])
        if over_since is None and is_over():
            over_since = time.monotonic()
        outlived = over_since is not None and time.monotonic() > over_since + OVER_SECONDS
        insisted = len(requests.received) > 1
        if outlived or (deadline is not None and (insisted or time.monotonic() > deadline)):
            _signal_group(process.pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _ask_to_stop(leader: int, is_rank: Callable[[Sequence[str]], bool], number: signal.Signals) -> None:
    """A signal to the ranks; SIGTERM to the whole group while there are none yet."""
    ranks = []
    for child in psutil.Process(leader).children(recursive=True):
        try:
            if is_rank(child.cmdline()):
                ranks.append(child)
        except psutil.NoSuchProcess:
            continue
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    if not ranks:
        _signal_group(leader, signal.SIGTERM)


def _end_group(leader: int) -> None:
    """Kill descendants that outlive the command: a launcher that was killed leaves its ranks behind."""
    deadline = time.monotonic() + LINGER_SECONDS
    while _signal_group(leader, 0):
        if time.monotonic() > deadline:
            # Not waited for: where nobody collects the dead, the group keeps its members for good.
            _signal_group(leader, signal.SIGKILL)
            return
        time.sleep(POLL_SECONDS)


def _signal_group(leader: int, number: int) -> bool:
    """False when the group has no members any more."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return False
    return True
