"""What a signal asks for."""

from __future__ import annotations

import signal

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.signals import STOP_SIGNALS
from mhc_dist.guard.stop import StopKind


def test_each_signal_has_its_exit_code() -> None:
    """Oracle: the table in the README."""
    codes = {number.name: StopKind.of(number).exit_code for number in STOP_SIGNALS}
    assert codes == {
        "SIGTERM": ExitCode.STOPPED,
        "SIGINT": ExitCode.STOPPED,
        "SIGUSR1": ExitCode.PREEMPTED,
    }
    assert (ExitCode.STOPPED, ExitCode.PREEMPTED) == (83, 84)
    assert signal.SIGUSR1 in STOP_SIGNALS
