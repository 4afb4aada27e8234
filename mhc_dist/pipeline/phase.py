"""What the executor needs of a chunk: phases and exchanges as callables over named values.

Nothing here knows about models. `parallel/chunk.py` builds these from model layers; tests build them from
a few lines of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from mhc_dist.pipeline.action import ChunkShape, ExchangeShape, PhaseShape


class ExchangeLoad(NamedTuple):
    """Bytes of one exchange between this rank and others; what a rank keeps for itself is none of it."""

    sent_bytes: int
    received_bytes: int


class PendingExchange(Protocol):
    """An exchange in flight."""

    @property
    def load(self) -> ExchangeLoad: ...

    def wait(self) -> Any:
        """Return what the exchange writes, complete for the compute stream. Called exactly once."""
        ...

    @property
    def token(self) -> Any:
        """After `wait`: when the result is complete, for other streams."""
        ...


@dataclass(frozen=True)
class Phase:
    """Local compute. `run(*values of shape.reads)` returns the values of `shape.writes`, in order.

    Values that are floating-point tensors are differentiable; everything else (token ids, routing plans)
    passes through untouched. A phase runs as its own autograd segment.
    """

    shape: PhaseShape
    run: Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Exchange:
    """A collective outside autograd: `issue` starts the forward, `issue_gradient` the mirrored backward.

    `issue(*values of shape.reads)` yields the one value of `shape.writes`. For a differentiable exchange the
    first read value is the payload; `issue_gradient(gradient of the output, *values of shape.reads[1:])`
    yields the gradient of the payload.
    """

    shape: ExchangeShape
    issue: Callable[..., PendingExchange]
    issue_gradient: Callable[..., PendingExchange] | None = None


Item = Phase | Exchange


class WeightQueue:
    """Weight gradients that a backward phase has put off, in the order they were put off.

    Linear layers ask `defer`; when nobody opened the queue they compute at once. Keys are
    (chunk, microbatch, phase name).
    """

    def __init__(self) -> None:
        self._pending: dict[tuple[int, int, str], list[Callable[[], None]]] = {}
        self._open: tuple[int, int, str] | None = None

    def open(self, key: tuple[int, int, str]) -> None:
        """Collect what follows under `key`."""
        assert self._open is None, f"queue already open for {self._open}"
        self._open = key
        self._pending[key] = []

    def close(self) -> None:
        self._open = None

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def put(self, work: Callable[[], None]) -> None:
        assert self._open is not None, "put on a closed queue"
        self._pending[self._open].append(work)

    def run(self, key: tuple[int, int, str]) -> None:
        """Do the work put off under `key`, in order, and forget it."""
        for work in self._pending.pop(key):
            work()

    @property
    def num_pending(self) -> int:
        return sum(len(works) for works in self._pending.values())


class Keeper(Protocol):
    """Lets phases of one microbatch drop part of what their backward needs, and brings it back."""

    def recording(self, phase: PhaseShape) -> AbstractContextManager[None]:
        """Wraps the forward of `phase`: what it saves for its backward passes through here."""
        ...

    def regenerate(self, phase: PhaseShape) -> None:
        """Bring back what the forward of `phase` dropped; after that of `phase.recompute_after`."""
        ...

    def forget(self, phase: PhaseShape) -> None:
        """The backward of `phase` is over."""
        ...


class Chunk(Protocol):
    """A chunk of the model on this rank.

    `make_keeper()` gives the keeper of one microbatch. None means that phases that drop do so wholly: only
    their inputs stay, and RECOMPUTE runs the phase once more.
    """

    index: int
    shape: ChunkShape
    items: tuple[Item, ...]
    weight_queue: WeightQueue

    def make_keeper(self) -> Keeper | None: ...
