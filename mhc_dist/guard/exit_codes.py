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
    """Ended on request (SIGTERM, SIGUSR1, Ctrl-C) before the last step."""
