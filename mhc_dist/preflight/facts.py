"""One rank about its host: who, which versions, how much room."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from mhc_launcher.code_hash import code_hash

PACKAGES = ("torch", "deepspeed", "numpy", "triton")


@dataclass(frozen=True)
class Facts:
    """What `gather` sends around; plain values."""

    rank: int
    node: str
    host: str
    pid: int
    num_cpus: int
    devices: tuple[str, ...]
    memory_bytes: int
    free_memory_bytes: int
    shared_memory_bytes: int
    folder: str
    free_disk_bytes: int
    can_write: bool
    versions: dict[str, str]


def look(rank: int, node: str, folder: Path) -> Facts:
    """Facts about this host; `folder` is where runs will be written."""
    memory = psutil.virtual_memory()
    there = folder if folder.exists() else folder.absolute().parent
    while not there.exists():
        there = there.parent
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    shared = Path("/dev/shm")
    return Facts(
        rank=rank,
        node=node,
        host=socket.gethostname(),
        pid=os.getpid(),
        num_cpus=len(os.sched_getaffinity(0)),
        devices=tuple(gpus),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        shared_memory_bytes=shutil.disk_usage(shared).free if shared.exists() else 0,
        folder=str(folder),
        free_disk_bytes=shutil.disk_usage(there).free,
        can_write=os.access(there, os.W_OK),
        versions={"python": platform.python_version(), "code": code_hash(), **_packages()},
    )


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
