"""A torch.distributed backend whose all-to-all and point-to-point messages travel an emulated link.

Whoever communicates through it, whatever the engine, sees the same network: memory that the ranks share
carries the data (`mailbox`), and a transfer is complete when the link would have delivered it as well.
Everything else (agreement, barriers) is gloo's own and costs nothing extra.

A message's delay counts from its SEND or, if the receiver was not ready by then, from its RECV: the two meet
before data moves, as with NCCL. An all-to-all is over when the last of its ranks would have delivered,
counted from that rank's own start. Ranks share a host, so they share the clock.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.bench.mailbox import Mailbox
from mhc_dist.bench.waiting import Asleep, Waiting
from mhc_dist.parallel.emulated_link import EmulatedLink

BACKEND = "bench_link"
ALL_TO_ALL, MESSAGE = 1, 2  # kinds of payloads, to a mailbox; tags, to gloo


@dataclass
class Route:
    """This process's way out, shared by all its groups.

    folder: where the ranks of this host share memory; None for the network as it is, through gloo. link: what
    holds back transfers through memory; None for nothing. waiting: how ranks wait for such transfers.
    """

    folder: Path | None = None
    link: EmulatedLink | None = None
    waiting: Waiting = field(default_factory=Asleep)


@dataclass(frozen=True)
class _Works:
    """Handle of an all-to-all through gloo."""

    works: tuple[dist.Work, ...]

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self.works:
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)


@dataclass
class _Exchange:
    """Handle of an all-to-all through memory: over when every rank's link has delivered."""

    mailbox: Mailbox
    number: int
    missing: dict[int, Tensor]
    """Results by the rank that they are to come from."""
    link: EmulatedLink | None
    landing: float

    def wait(self, timeout: timedelta | None = None) -> bool:
        for rank in list(self.missing):
            self._take(rank)
        if self.link is not None:
            self.link.wait(self.landing)
        return True

    def is_completed(self) -> bool:
        for rank in list(self.missing):
            if not self.mailbox.has(rank, ALL_TO_ALL, self.number):
                return False
            self._take(rank)
        return self.link is None or self.link.clock() >= self.landing

    def _take(self, rank: int) -> None:
        note = self.mailbox.take(rank, ALL_TO_ALL, self.number, self.missing.pop(rank))
        self.landing = max(self.landing, note.left + note.seconds)


@dataclass
class _Departure:
    """Handle of a SEND through memory: over when the link has delivered."""

    link: EmulatedLink | None
    landing: float

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self.link is not None:
            self.link.wait(self.landing)
        return True

    def is_completed(self) -> bool:
        return self.link is None or self.link.clock() >= self.landing


@dataclass
class _Arrival:
    """Handle of a RECV through memory: the note says when the message left and how long it takes."""

    mailbox: Mailbox
    source: int
    number: int
    result: Tensor
    link: EmulatedLink | None
    posted: float
    landing: float | None = None
    """None until the message was taken."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        landing = self._take() if self.landing is None else self.landing
        if self.link is not None:
            self.link.wait(landing)
        return True

    def is_completed(self) -> bool:
        if self.landing is None and not self.mailbox.has(self.source, MESSAGE, self.number):
            return False
        landing = self._take() if self.landing is None else self.landing
        return self.link is None or self.link.clock() >= landing

    def _take(self) -> float:
        note = self.mailbox.take(self.source, MESSAGE, self.number, self.result)
        self.landing = max(note.left, self.posted) + note.seconds
        return self.landing


class LinkedGroup(dist.ProcessGroup):
    """A gloo group on a route. Methods are those that `torch.distributed` calls."""

    def __init__(self, gloo: Any, rank: int, size: int, route: Route, mailbox: Mailbox | None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stubs know another overload only
        self._gloo, self._route, self._mailbox = gloo, route, mailbox
        self._num_exchanges = 0
        self._num_sent: Counter[int] = Counter()
        self._num_received: Counter[int] = Counter()
        # Tells torch which devices and types of backend there are; the calls go to gloo directly.
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name for it
        return BACKEND

    # Not inherited: the base class calls its backend without giving up the interpreter's lock, and gloo's
    # threads need that lock to let go of a finished transfer's tensors. Both then wait for ever.

    def allreduce(self, *arguments: Any, **named: Any) -> Any:
        return self._gloo.allreduce(*arguments, **named)

    def broadcast(self, *arguments: Any, **named: Any) -> Any:
        return self._gloo.broadcast(*arguments, **named)

    def allgather(self, *arguments: Any, **named: Any) -> Any:
        return self._gloo.allgather(*arguments, **named)

    def barrier(self, *arguments: Any, **named: Any) -> Any:
        return self._gloo.barrier(*arguments, **named)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: Any = None,
    ) -> Any:
        """Message by message; on a network, receives first.

        gloo's own all-to-all sends first: a rank that comes late then puts its announcement that it is ready
        to receive behind its own data, and the two directions of a slow link take turns.
        """
        size, own = self.size(), self.rank()
        outputs: tuple[Tensor, ...] = output.split(output_split_sizes or output.shape[0] // size)
        inputs: tuple[Tensor, ...] = input.split(input_split_sizes or input.shape[0] // size)
        others = [(own + step) % size for step in range(1, size)]
        outputs[own].copy_(inputs[own])
        if self._mailbox is None:
            works = [self._gloo.recv([outputs[rank]], rank, ALL_TO_ALL) for rank in others]
            works += [self._gloo.send([inputs[rank]], rank, ALL_TO_ALL) for rank in others]
            return _Works(tuple(works))
        number, link = self._num_exchanges, self._route.link
        self._num_exchanges += 1
        payload_bytes = sum(inputs[rank].numel() for rank in others) * input.element_size()
        landing, seconds = _on(link, payload_bytes)
        for rank in others:
            self._mailbox.put(rank, ALL_TO_ALL, number, inputs[rank], landing - seconds, seconds)
        missing = {rank: outputs[rank] for rank in others}
        return _Exchange(self._mailbox, number, missing, link, landing)

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> Any:
        if self._mailbox is None:
            return self._gloo.send(list(tensors), dstRank, MESSAGE + tag)
        (tensor,) = tensors
        link, number = self._route.link, self._num_sent[dstRank]
        self._num_sent[dstRank] += 1
        landing, seconds = _on(link, tensor.numel() * tensor.element_size())
        self._mailbox.put(dstRank, MESSAGE, number, tensor, landing - seconds, seconds)
        return _Departure(link, landing)

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> Any:
        if self._mailbox is None:
            return self._gloo.recv(list(tensors), srcRank, MESSAGE + tag)
        (tensor,) = tensors
        link, number = self._route.link, self._num_received[srcRank]
        self._num_received[srcRank] += 1
        posted = 0.0 if link is None else link.clock()
        return _Arrival(self._mailbox, srcRank, number, tensor, link, posted)


def _on(link: EmulatedLink | None, payload_bytes: int) -> tuple[float, float]:
    """Put a payload on the link: when it will have landed, and how long it takes."""
    return (0.0, 0.0) if link is None else (link.send(payload_bytes), link.seconds(payload_bytes))


def register(route: Route) -> str:
    """Make the backend known to torch.distributed in this process, on `route`; returns its name."""

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> LinkedGroup:
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        mailbox = None
        if route.folder is not None:
            if rank == 0:
                store.set("folder", tempfile.mkdtemp(dir=route.folder))
            folder = Path(store.get("folder").decode())
            mailbox = Mailbox(folder, store, rank, size, timeout.total_seconds(), route.waiting)
        return LinkedGroup(gloo, rank, size, route, mailbox)

    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])
    return BACKEND
