"""How much memory a rank uses: of its GPU where it has one, else of its process."""

from __future__ import annotations

import resource
import sys
from typing import NamedTuple

import psutil
import torch


class MemoryUse(NamedTuple):
    """Bytes in use now, and the most that were so far."""

    allocated_bytes: int
    peak_bytes: int


def memory_use(device: torch.device) -> MemoryUse:
    """Tensors on the GPU, or the resident size of this process. No synchronisation."""
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage counts kilobytes on Linux and bytes on macOS.
    return MemoryUse(psutil.Process().memory_info().rss, peak if sys.platform == "darwin" else peak * 1024)
