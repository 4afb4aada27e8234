"""Commands on other hosts over ssh: with the user's own settings, never a question, never without an end."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
"""Where pdsh looks for further arguments of ssh; the same ones are used here."""
CONNECT_SECONDS = 10
# A node that loses power says nothing: without these ssh, and so pdsh, would wait for it for good.
KEEP_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
NEVER_ASK = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What a command on a host printed; `exit_code` 255 is ssh's own: the host was not reached."""

    host: str
    exit_code: int
    out: str
    error: str

    @property
    def last_error(self) -> str:
        lines = self.error.strip().splitlines()
        return lines[-1].strip() if lines else "no message"


def check_installed() -> None:
    """Raise ValueError when this host has no ssh client."""
    if shutil.which("ssh") is None:
        raise ValueError(
            "ssh is not installed here (or not in PATH), and --launcher pdsh and openmpi reach other hosts"
            " with it. Install it (Debian: apt-get install openssh-client), or start every node by itself:"
            " --no-ssh --node-rank R --master-addr A."
        )


def client_arguments(environ: Mapping[str, str], port: int | None) -> list[str]:
    """Arguments of ssh before the host's name."""
    chosen = shlex.split(environ.get(ARGUMENTS, ""))
    return [*NEVER_ASK, *KEEP_ALIVE, *chosen, *(("-p", str(port)) if port is not None else ())]


def run_on(host: str, command: Sequence[str], timeout_seconds: float, port: int | None = None) -> Answer:
    """Run `command` on `host` in this process's folder; never raises for what happens there."""
    remote = f"cd {shlex.quote(os.getcwd())} && {_python_path()}{shlex.join(command)}"
    line = ["ssh", *client_arguments(os.environ, port), host, remote]
    try:
        done = subprocess.run(
            line,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(host, 255, "", f"no answer within {timeout_seconds:g} s")
    return Answer(host, done.returncode, done.stdout, done.stderr)


def run_on_all(
    hosts: Sequence[str], command: Sequence[str], timeout_seconds: float, port: int | None = None
) -> list[Answer]:
    """The same on all hosts at once; answers in the order of the hosts."""
    with ThreadPoolExecutor(min(MOST_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(lambda host: run_on(host, command, timeout_seconds, port), hosts))


def _python_path() -> str:
    path = os.environ.get("PYTHONPATH")
    return f"PYTHONPATH={shlex.quote(path)} " if path else ""
