"""Messages between pipeline neighbours: streams forward, their gradients back.

Each ordered pair of ranks has a communicator of its own. Within one, messages are matched by order alone
(what NCCL does), and the validated program guarantees that both ends agree on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class PendingMessage(Protocol):
    """A message in flight."""

    def wait(self) -> Tensor: ...

    @property
    def payload_bytes(self) -> int: ...


class Transport(Protocol):
    """Point-to-point messages of one fixed shape."""

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start sending; the tensor must not change until `drain`."""
        ...

    def receive(self, peer: int) -> PendingMessage: ...

    def drain(self) -> None:
        """Wait until everything sent has left."""
        ...


@dataclass
class _Receiving:
    buffer: Tensor
    work: dist.Work

    @property
    def payload_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def wait(self) -> Tensor:
        self.work.wait()
        return self.buffer


class GroupTransport:
    """Transport over torch.distributed. `peer_rank[p]` is pipeline rank p's global rank in this column."""

    def __init__(
        self,
        channels: Mapping[tuple[int, int], dist.ProcessGroup],
        peer_rank: Mapping[int, int],
        rank: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._channels, self._peer_rank, self._rank = channels, peer_rank, rank
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @property
    def message_bytes(self) -> int:
        """Bytes of one message."""
        return math.prod(self._shape) * self._dtype.itemsize

    def send(self, tensor: Tensor, peer: int) -> None:
        assert tensor.shape == self._shape, (tensor.shape, self._shape)
        assert tensor.dtype == self._dtype, (tensor.dtype, self._dtype)
        target = self._peer_rank[peer]
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, target, group=self._channels[self._rank, target])
        assert work is not None
        # Finished sends give their buffers back here; no wait.
        self._sending = [(w, t) for w, t in self._sending if not w.is_completed()]
        self._sending.append((work, tensor))

    def receive(self, peer: int) -> PendingMessage:
        source = self._peer_rank[peer]
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        work = dist.irecv(buffer, source, group=self._channels[source, self._rank])
        assert work is not None
        return _Receiving(buffer, work)

    def drain(self) -> None:
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
