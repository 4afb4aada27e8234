"""Requests to stop, readable by a thread even while the main thread is stuck in a collective.

Python runs signal handlers in the main thread only, between two bytecodes; a rank that waits in gloo or
NCCL for a dead peer never gets there. The interpreter's low-level handler, however, runs at once on
whatever thread the kernel picks, and writes the signal's number into a file descriptor of our choice. So
the handlers installed here do nothing, and a watching thread reads that descriptor.

Blocking the signals and collecting them with sigtimedwait would need every thread to block them, those of
libraries loaded earlier included, and every program started by a rank would inherit them blocked.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class SignalInbox:
    """Catches the stop signals of this process from construction to `close()`.

    Make one early in the main thread: until then a signal ends the process as usual. Forked children get
    the default behaviour back.
    """

    def __init__(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "signals belong to the main thread"
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._pending: list[signal.Signals] = []
        self._owner = os.getpid()
        self._open = True
        self._previous = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            # System calls of libraries that the signal interrupts go on where the kernel can restart them.
            signal.siginterrupt(number, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._at_fork = threading.local()
        os.register_at_fork(
            before=self._hold_signals,
            after_in_parent=self._release_signals,
            after_in_child=self._let_go_in_child,
        )

    def wait(self, timeout_seconds: float) -> signal.Signals | None:
        """The next stop signal, or None after `timeout_seconds`. For one thread, any thread."""
        deadline = time.monotonic() + timeout_seconds
        while not self._pending:
            readable, _, _ = select.select([self._receiver], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return None
            # Other handlers of this process (SIGCHLD, say) write their numbers here too.
            numbers = self._receiver.recv(256)
            self._pending.extend(signal.Signals(number) for number in numbers if number in STOP_SIGNALS)
        return self._pending.pop(0)

    def close(self) -> None:
        """Put back the handlers that were there before. Main thread only; no `wait` may be under way."""
        if not self._open:
            return
        self._open = False
        signal.set_wakeup_fd(self._previous_descriptor)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._receiver.close()
        self._sender.close()

    def _hold_signals(self) -> None:
        # A signal that meets the child before it let go would land in the parent's inbox.
        self._at_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _release_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._at_fork.mask)

    def _let_go_in_child(self) -> None:
        # A worker forked from a rank must die of SIGTERM, not write into the rank's inbox.
        if self._open and os.getpid() != self._owner:
            self._open = False
            signal.set_wakeup_fd(-1)
            for number in STOP_SIGNALS:
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
        self._release_signals()


def _ignore(number: int, frame: FrameType | None) -> None:
    """The inbox has the signal already."""
