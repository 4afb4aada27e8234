"""Messages between pipeline neighbours: streams forward, their gradients back.

Each ordered pair of ranks has a communicator of its own. Within one, messages are matched by order alone
(what NCCL does), and the validated program guarantees that both ends agree on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.pipeline.streams import Flight, HostStreams, Streams, Token, Work


class PendingMessage(Protocol):
    """A message in flight."""

    def wait(self) -> Tensor:
        """The message, complete for the compute stream."""
        ...

    @property
    def token(self) -> Any:
        """After `wait`: when it is complete, for other streams."""
        ...

    @property
    def payload_bytes(self) -> int: ...


class Transport(Protocol):
    """Point-to-point messages of one fixed shape."""

    def send(self, tensor: Tensor, peer: int) -> None:
        """Start sending; the tensor must not change until `drain`. Compute does not wait for the receiver."""
        ...

    def receive(self, peer: int) -> PendingMessage: ...

    def drain(self) -> None:
        """What follows comes after everything that was sent has left."""
        ...


@dataclass
class _Receiving:
    buffer: Tensor
    flight: Flight
    token: Token = None

    @property
    def payload_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def wait(self) -> Tensor:
        self.token = self.flight.land()
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
        streams: Streams | None = None,
    ) -> None:
        self._streams = streams or HostStreams()
        self._channels, self._peer_rank, self._rank = channels, peer_rank, rank
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sending: dict[int, Flight] = {}

    @property
    def message_bytes(self) -> int:
        """Bytes of one message."""
        return math.prod(self._shape) * self._dtype.itemsize

    def send(self, tensor: Tensor, peer: int) -> None:
        assert tensor.shape == self._shape, (tensor.shape, self._shape)
        assert tensor.dtype == self._dtype, (tensor.dtype, self._dtype)
        target = self._peer_rank[peer]
        tensor = tensor.detach().contiguous()
        channel = self._channels[self._rank, target]

        def start() -> Work:
            work = dist.isend(tensor, target, group=channel)
            assert work is not None
            return work

        # One message per channel keeps its buffer. The one before has been received by now or is about to be
        # (its RECV was posted before it left), and gloo only says so to those who wait.
        before = self._sending.pop(peer, None)
        if before is not None:
            before.release()
        self._sending[peer] = self._streams.transfer(f"message {self._rank}>{target}", start, [tensor])

    def receive(self, peer: int) -> PendingMessage:
        source = self._peer_rank[peer]
        buffer = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        channel = self._channels[source, self._rank]

        def start() -> Work:
            work = dist.irecv(buffer, source, group=channel)
            assert work is not None
            return work

        return _Receiving(buffer, self._streams.transfer(f"message {source}>{self._rank}", start, [buffer]))

    def drain(self) -> None:
        for flight in self._sending.values():
            flight.land()
        self._sending.clear()
