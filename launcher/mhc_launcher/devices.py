"""What this host computes on, found out without torch: importing it costs seconds."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

Backend = Literal["auto", "gloo", "nccl"]


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that processes started here may use, as CUDA_VISIBLE_DEVICES writes them."""
    present = sorted(
        int(match[1])
        for node in Path("/dev").glob("nvidia*")
        if (match := re.fullmatch(r"nvidia(\d+)", node.name))
    )
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not present:
        return [str(index) for index in range(len(present))]
    # CUDA ignores everything from the first entry it does not know; -1 is the customary way to hide all.
    names: list[str] = []
    for name in filter(None, map(str.strip, chosen.split(","))):
        if name.startswith("-"):
            break
        names.append(name)
    return names


def gpus_for_run(backend: Backend, num_processes: int) -> list[str]:
    """One GPU per process, or none when the run computes on the CPU.

    Raises ValueError when the run wants GPUs that are not here.
    """
    gpus = visible_gpus()
    if backend == "gloo" or (backend == "auto" and not gpus):
        return []
    if len(gpus) < num_processes:
        raise ValueError(
            f"train.backend={backend}: parallel.pipeline x parallel.data = {num_processes} processes need a"
            f" GPU each, {len(gpus)} are visible here. Lower parallel.pipeline or parallel.data, or set"
            " train.backend=gloo to compute on the CPU."
        )
    return gpus[:num_processes]


def threads_per_process(num_processes: int) -> int:
    """CPU threads each process may use without getting in the others' way."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)
