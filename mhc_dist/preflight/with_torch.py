"""Messages over torch.distributed (gloo), for a preflight that torchrun or the deepspeed launcher started.

Buffers are in host memory: what is looked at are hosts and their network. GPUs' own links are measured by
runs, with `mhc-dist plan --calibrate`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mhc_dist.parallel.process_groups import RankPlace, destroy, init_distributed
from mhc_dist.preflight.communicator import Buffer


class TorchCommunicator:
    """All processes of this torchrun; a single one when nothing started others."""

    def __init__(self, place: RankPlace, timeout_seconds: float = 60.0) -> None:
        init_distributed(place, "gloo", timeout_seconds)
        self.rank = place.rank
        self.size = place.world_size
        self.library = f"torch {torch.__version__} gloo"

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        dist.barrier()

    def send(self, buffer: Buffer, to: int) -> None:
        dist.send(torch.from_numpy(buffer), to)

    def receive(self, buffer: Buffer, source: int) -> None:
        dist.recv(torch.from_numpy(buffer), source)

    def all_to_all(self, sent: Buffer, received: Buffer) -> None:
        dist.all_to_all_single(torch.from_numpy(received), torch.from_numpy(sent))

    def close(self) -> None:
        dist.barrier()
        destroy()
