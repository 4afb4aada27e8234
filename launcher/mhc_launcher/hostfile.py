"""Which hosts a run may use and how many processes each takes: `host slots=4`, one host a line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """One node: its name as the other nodes know it, and its number of processes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile in order; empty lines and `#` comments are left out.

    Raises ValueError, with the line and the remedy, for anything else that is not a host with slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"--hostfile {path}: cannot be read: {error.strerror}. Name an existing file."
        ) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) == 0:
            raise ValueError(
                f"{path}, line {number}: {text!r} is not of the form `host slots=4`, with 1 slot or more."
                " Correct the line."
            )
        if match[1] in (host.name for host in hosts):
            raise ValueError(
                f"{path}, line {number}: host {match[1]} is listed twice. Keep one line for it, with all its"
                " slots."
            )
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ValueError(f"{path} names no host. Write lines of the form `host slots=4`.")
    return hosts


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def check_slots(hosts: Sequence[Host], num_processes: int, pipeline: int, data: int, source: str) -> None:
    """Raise ValueError unless the hosts take exactly the processes of the run."""
    total = sum(host.slots for host in hosts)
    if total != num_processes:
        listed = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise ValueError(
            f"{source} has {total} slots ({listed}), but parallel.pipeline={pipeline} x parallel.data={data}"
            f" needs {num_processes} processes. Change the slots, or the two sizes, until they agree."
        )
