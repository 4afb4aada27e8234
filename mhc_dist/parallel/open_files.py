"""How many files a rank has open: each connection is one, and in a group of gloo all are connected with all.

Hosts commonly allow a process 1024 unless it asks for more: a run of some 300 ranks would fail at its start.
Standard library only.
"""

from __future__ import annotations

import resource

OWN_FILES = 256
"""Of a rank by itself: libraries, text, logs, metrics, a checkpoint being written."""

WORLD_GROUPS = 3
"""Groups of all ranks through gloo: the world itself on CPUs, agreement, checkpoints (`ProcessGroups`)."""

STORE_CLIENTS = 3
"""Connections of one rank to the run's store, at most: the world's, the watchdog's, and one to be sure."""


def files_needed(world_size: int, *, hosts_store: bool) -> int:
    """Files that one rank of `world_size` may have open at a time."""
    return OWN_FILES + world_size * (WORLD_GROUPS + (STORE_CLIENTS if hosts_store else 0))


def allow_open_files(world_size: int, *, hosts_store: bool) -> None:
    """Raise this process's limit to what a rank needs. ValueError where the host does not allow that."""
    needed = files_needed(world_size, hosts_store=hosts_store)
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY or now >= needed:
        return
    if most != resource.RLIM_INFINITY and most < needed:
        raise ValueError(
            f"one of {world_size} ranks has up to {needed} files open, most of them connections to others,"
            f" and this host allows {most}. Raise the hard limit of open files to {needed}: `ulimit -Hn`,"
            " LimitNOFILE of systemd, or --ulimit nofile of a container."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
