"""Stop signals reach a thread, whatever the main thread does; children are left alone."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from mhc_dist.guard.signals import STOP_SIGNALS, SignalInbox


@pytest.fixture
def inbox() -> Iterator[SignalInbox]:
    found = SignalInbox()
    yield found
    found.close()


def test_a_signal_is_read_by_another_thread_while_main_is_blocked(inbox: SignalInbox) -> None:
    """Oracle: main waits for a lock it never gets; the thread that reads the inbox releases it."""
    caught: list[signal.Signals | None] = []
    held = threading.Lock()
    held.acquire()

    def read() -> None:
        caught.append(inbox.wait(10.0))
        held.release()

    threading.Thread(target=read).start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert held.acquire(timeout=10.0)
    assert caught == [signal.SIGTERM]


def test_signals_are_delivered_once_and_in_order(inbox: SignalInbox) -> None:
    """Oracle: what was sent, then nothing until the time is up."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert [inbox.wait(1.0) for _ in range(3)] == [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    start = time.monotonic()
    assert inbox.wait(0.1) is None
    assert time.monotonic() - start >= 0.1


def test_a_forked_child_dies_of_sigterm(inbox: SignalInbox) -> None:
    """Oracle: the child's wait status, and the parent's inbox stays empty."""
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert inbox.wait(0.1) is None


def test_closing_restores_what_was_there() -> None:
    """Oracle: the handlers before and after."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    inbox = SignalInbox()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    inbox.close()
    inbox.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
