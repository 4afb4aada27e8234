"""Whether a process of this machine is still there: read from /proc, no permission needed.

A process is named by more than its number: numbers are reused, and two containers on one host have
separate sets of them.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessName:
    """One process, unambiguous across hosts, containers and time."""

    host: str
    pid_space: str
    """Boot and process-id namespace: two processes see each other's pids only if this is equal."""
    pid: int
    started: int
    """Clock ticks from boot to the process's start."""

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def this_process() -> ProcessName:
    """The calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.readlink("/proc/self/ns/pid")
    started = _state_and_start(os.getpid())
    assert started is not None
    return ProcessName(socket.gethostname(), f"{boot} {namespace}", os.getpid(), started[1])


def is_alive(process: ProcessName) -> bool:
    """Whether a process of this pid space still runs. A zombie does not: its parent is just late."""
    found = _state_and_start(process.pid)
    return found is not None and found[1] == process.started and found[0] not in "ZX"


def _state_and_start(pid: int) -> tuple[str, int] | None:
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name, in parentheses, may hold spaces and parentheses itself.
    fields = content.rpartition(")")[2].split()
    return fields[0], int(fields[19])
