"""A torch.distributed backend whose all-to-all and point-to-point messages travel an emulated link.

Whoever communicates through it, whatever the engine, sees the same network: gloo carries the data, and a
transfer is complete when the link would have delivered it as well. Everything else (agreement, barriers) is
gloo's own and costs nothing extra.

A message's delay counts from its SEND or, if the receiver was not ready by then, from its RECV: the two meet
before data moves, as with NCCL. An all-to-all is over when the last of its ranks would have delivered,
counted from that rank's own start. Ranks share a host, so they share the clock, and a board for such times.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.parallel.emulated_link import EmulatedLink

BACKEND = "bench_link"
ALL_TO_ALL_TAG = 1  # messages between pipeline ranks have 0
BOARD_SIZE = 4096  # all-to-alls of a group, far more than are ever under way


@dataclass
class Route:
    """This process's way out; no link means the network as it is. Shared by all groups of the process."""

    link: EmulatedLink | None = None


class _Board:
    """When every rank's share of an all-to-all will have landed: memory that the ranks of a group share.

    A rank writes before its data leaves, so whoever has the data also sees the time.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Collective."""
        if rank == 0:
            handle, path = tempfile.mkstemp(prefix="mhc_board_")
            os.close(handle)
            store.set("board", path)
        else:
            path = store.get("board").decode()
        flat = torch.from_file(path, shared=True, size=size * BOARD_SIZE, dtype=torch.float64)
        self._landings = flat.view(size, BOARD_SIZE)
        store.set(f"board {rank}", "mapped")
        if rank == 0:
            store.wait([f"board {other}" for other in range(size)])
            os.unlink(path)
        self._rank = rank

    def write(self, number: int, landing: float) -> None:
        self._landings[self._rank, number % BOARD_SIZE] = landing

    def latest(self, number: int) -> float:
        return float(self._landings[:, number % BOARD_SIZE].max())


@dataclass
class _Exchange:
    """Handle of an all-to-all: over when the data has moved and every rank's link has delivered."""

    works: tuple[dist.Work, ...]
    link: EmulatedLink | None
    board: _Board
    number: int

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self.works:
            work.wait()
        if self.link is not None:
            self.link.wait(self.board.latest(self.number))
        return True

    def is_completed(self) -> bool:
        if not all(work.is_completed() for work in self.works):
            return False
        return self.link is None or self.link.clock() >= self.board.latest(self.number)


@dataclass
class _Departure:
    """Handle of a SEND: over when the data has moved and the link has delivered."""

    works: tuple[dist.Work, ...]
    link: EmulatedLink
    landing: float
    keep: Tensor
    """A buffer of this file's own that must stay until it has left."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self.works:
            work.wait()
        self.link.wait(self.landing)
        return True

    def is_completed(self) -> bool:
        return self.link.clock() >= self.landing and all(work.is_completed() for work in self.works)


@dataclass
class _Arrival:
    """Handle of a RECV: the sender's note says when its message left and how long it occupies the link."""

    works: tuple[dist.Work, dist.Work]
    note: Tensor
    link: EmulatedLink
    posted: float

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self.works:
            work.wait()
        left, seconds = self.note.tolist()
        self.link.wait(max(left, self.posted) + seconds)
        return True

    def is_completed(self) -> bool:
        if not all(work.is_completed() for work in self.works):
            return False
        left, seconds = self.note.tolist()
        landed: bool = self.link.clock() >= max(left, self.posted) + seconds
        return landed


class LinkedGroup(dist.ProcessGroup):
    """A gloo group on a route. Methods are those that `torch.distributed` calls."""

    def __init__(self, gloo: Any, rank: int, size: int, route: Route, board: _Board) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stubs know another overload only
        self._gloo, self._route, self._board = gloo, route, board
        self._num_exchanges = 0
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
        """Message by message, receives first.

        gloo's own all-to-all sends first: a rank that comes late then puts its announcement that it is ready
        to receive behind its own data, and the two directions of a slow link take turns.
        """
        size, own = self.size(), self.rank()
        outputs: tuple[Tensor, ...] = output.split(output_split_sizes or output.shape[0] // size)
        inputs: tuple[Tensor, ...] = input.split(input_split_sizes or input.shape[0] // size)
        others = [(own + step) % size for step in range(1, size)]
        number, link = self._num_exchanges, self._route.link
        self._num_exchanges += 1
        if link is not None:
            payload_bytes = sum(inputs[rank].numel() for rank in others) * input.element_size()
            self._board.write(number, link.send(payload_bytes))
        works = [self._gloo.recv([outputs[rank]], rank, ALL_TO_ALL_TAG) for rank in others]
        works += [self._gloo.send([inputs[rank]], rank, ALL_TO_ALL_TAG) for rank in others]
        outputs[own].copy_(inputs[own])
        return _Exchange(tuple(works), link, self._board, number)

    def send(self, tensors: Sequence[Tensor], dstRank: int, tag: int = 0) -> Any:
        link = self._route.link
        if link is None:
            return self._gloo.send(list(tensors), dstRank, tag)
        (tensor,) = tensors
        payload_bytes = tensor.numel() * tensor.element_size()
        landing = link.send(payload_bytes)
        seconds = link.seconds(payload_bytes)
        note = torch.tensor([landing - seconds, seconds], dtype=torch.float64)
        works = (self._gloo.send([note], dstRank, tag), self._gloo.send([tensor], dstRank, tag))
        return _Departure(works, link, landing, note)

    def recv(self, tensors: Sequence[Tensor], srcRank: int, tag: int = 0) -> Any:
        link = self._route.link
        if link is None:
            return self._gloo.recv(list(tensors), srcRank, tag)
        note = torch.empty(2, dtype=torch.float64)
        posted = link.clock()
        works = (self._gloo.recv([note], srcRank, tag), self._gloo.recv(list(tensors), srcRank, tag))
        return _Arrival(works, note, link, posted)


def register(route: Route) -> str:
    """Make the backend known to torch.distributed in this process, on `route`; returns its name."""

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> LinkedGroup:
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        return LinkedGroup(gloo, rank, size, route, _Board(store, rank, size))

    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])
    return BACKEND
