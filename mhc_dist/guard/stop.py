"""Why a run ends before its last step because someone asked for it."""

from __future__ import annotations

import signal
from enum import Enum

from mhc_dist.guard.exit_codes import ExitCode


class StopKind(Enum):
    """STOPPED: someone wants the run to end. PREEMPTED: it loses its place and will be started again."""

    STOPPED = ExitCode.STOPPED
    PREEMPTED = ExitCode.PREEMPTED

    @property
    def exit_code(self) -> ExitCode:
        return self.value

    @staticmethod
    def of(caught: signal.Signals) -> StopKind:
        """SIGUSR1 is what schedulers are told to send before they take the machines away."""
        return StopKind.PREEMPTED if caught == signal.SIGUSR1 else StopKind.STOPPED
