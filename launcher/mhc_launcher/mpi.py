"""What mpirun has to be told, beyond what DeepSpeed's launcher tells it. Open MPI 5."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from mhc_launcher.interfaces import addresses


def is_this_host(name: str) -> bool:
    """Whether a host of a hostfile is the one we are on."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(name, None)}
    except socket.gaierror:
        return False
    own = {address for every in addresses().values() for address in every}
    return bool(found & own)


def arguments(interface: str | None, chosen: Sequence[str]) -> list[str]:
    """Arguments of mpirun: ours first, so that the user's `--launcher-args` have the last word."""
    own = [
        # Ranks have threads of their own; bound to one core each they would share it.
        *("--bind-to", "none"),
        # DeepSpeed would name eth0, which many hosts do not have.
        *("--mca", "btl_tcp_if_include", interface or "lo"),
    ]
    if os.geteuid() == 0:
        # In containers; mpirun refuses root otherwise.
        own.append("--allow-run-as-root")
    if "btl_tcp_if_include" in chosen:
        own = [part for part in own if part not in ("--mca", "btl_tcp_if_include", interface or "lo")]
    return [*own, *chosen]
