"""What a process of a run tells its caller by its exit code. Scripts may rely on these numbers."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Codes between shells' own (1, 2, 126 and above) and sysexits (64 to 78), so none is mistaken."""

    OK = 0
    """The run reached its last step."""
    ERROR = 1
    """An error inside the program; a traceback says where."""
    USAGE = 2
    """What the user wrote cannot be run: one message with numbers and remedy."""
    PEER_DIED = 81
    """Another process of the run died or failed; the message names it."""
    STUCK = 82
    """An action took longer than allowed; the message says what every rank was doing."""
    STOPPED = 83
    """Ended on request (SIGTERM, Ctrl-C) before the last step; the state is saved."""
    PREEMPTED = 84
    """The same after SIGUSR1, a scheduler's warning: start the run again with --resume auto."""
    DIVERGED = 85
    """Losses or gradients stayed not finite, even after returning to the last checkpoint."""
    UNSAVED = 86
    """Ended on request, but the last checkpoint could not be written; an earlier one is there, if any."""
