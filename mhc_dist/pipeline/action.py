"""The vocabulary of a pipeline program: what one rank can be told to do. Standard library only.

A `Program` is plain data: one tuple of `Action` per rank. The same object is validated, simulated and
executed, so what was proven about it is what runs.

Words used everywhere in this package:

* *chunk*: consecutive layers, numbered in model order; `chunk_rank[c]` is the rank that owns chunk c.
* *item*: one node of a chunk's dataflow, either a *phase* (local compute) or an *exchange* (a collective
  over the expert group). Items read and write named values; every value is written once.
* *pass*: forward or backward. The backward of an item mirrors it: it consumes the gradients of what the
  item wrote and produces the gradients of what it read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

CHUNK_INPUT = "input"
"""Name of the value a chunk receives: the streams of the previous chunk, or the tokens for chunk 0."""

CHUNK_OUTPUT = "output"
"""Name of the value a chunk hands on: its streams, or the loss for the last chunk."""

CHUNK_TARGETS = "targets"
"""Name of the value the last chunk reads beside its streams: the next tokens, given with the batch."""


class Pass(StrEnum):
    """Direction of travel through the model."""

    __hash__ = str.__hash__  # in C: actions are looked up by the million

    FORWARD = "F"
    BACKWARD = "B"


class ActionKind(StrEnum):
    """What a rank does. The comment names the fields of `Action` each kind uses beyond chunk, microbatch."""

    __hash__ = str.__hash__

    COMPUTE = "compute"  # item: run one phase forward
    GRADIENT = "gradient"  # item, defer_weights: run one phase backward
    WEIGHT = "weight"  # item: run the weight gradients that GRADIENT deferred
    RECOMPUTE = "recompute"  # item: regenerate what the forward of that phase dropped
    ISSUE = "issue"  # item, direction: start an exchange, return at once
    WAIT = "wait"  # item, direction: complete an exchange
    SEND = "send"  # direction, peer: start sending the chunk's output (F) or its input's gradient (B)
    RECV = "recv"  # direction, peer: post the receive of the chunk's input (F) or output gradient (B)
    ARRIVE = "arrive"  # direction, peer: complete a posted receive
    HAND_OVER = "hand_over"  # direction: like SEND + ARRIVE when the neighbouring chunk is on the same rank
    FREE = "free"  # drop everything held for (chunk, microbatch)
    REDUCE = "reduce"  # reduce gradients over data ranks (no chunk)
    STEP = "step"  # optimizer step (no chunk)


@dataclass(frozen=True, slots=True)
class Action:
    """One instruction of one rank. Unused fields keep their defaults.

    For SEND and HAND_OVER `chunk` is the producing chunk (F: its output; B: the gradient of its input).
    For RECV and ARRIVE `chunk` is the consuming chunk.
    """

    kind: ActionKind
    chunk: int = -1
    microbatch: int = -1
    item: str = ""
    direction: Pass | None = None
    peer: int | None = None
    defer_weights: bool = False

    def __str__(self) -> str:
        parts = [self.kind.value if self.direction is None else f"{self.kind.value}.{self.direction.value}"]
        if self.chunk >= 0:
            parts.append(f"c{self.chunk} m{self.microbatch}")
        if self.item:
            parts.append(self.item)
        if self.peer is not None:
            parts.append(f"rank{self.peer}")
        if self.defer_weights:
            parts.append("defer")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class PhaseShape:
    """A phase as the lowering sees it: name and dataflow, no code.

    `has_weights` is false for phases without deferrable weight gradients: they get no WEIGHT action.
    `drops` marks phases that drop part of what their backward needs: one RECOMPUTE regenerates it between
    forward and backward, after the RECOMPUTE of the phases `recompute_after` (earlier ones of its block).
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    has_weights: bool = True
    drops: bool = False
    recompute_after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ExchangeShape:
    """An exchange over the expert group as the lowering sees it.

    Non-differentiable exchanges (token counts) have no backward.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    differentiable: bool = True


ItemShape = PhaseShape | ExchangeShape


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """The dataflow of one chunk: items in forward order, from CHUNK_INPUT to CHUNK_OUTPUT."""

    items: tuple[ItemShape, ...]

    @property
    def phases(self) -> tuple[PhaseShape, ...]:
        return tuple(item for item in self.items if isinstance(item, PhaseShape))

    @property
    def exchanges(self) -> tuple[ExchangeShape, ...]:
        return tuple(item for item in self.items if isinstance(item, ExchangeShape))


@dataclass(frozen=True, slots=True)
class Layout:
    """Who owns which chunk, and which microbatches go through it."""

    chunk_rank: tuple[int, ...]
    num_microbatches: int
    num_copies: int = 1

    @property
    def chunks_per_copy(self) -> int:
        return len(self.chunk_rank) // self.num_copies

    def previous(self, chunk: int) -> int | None:
        """The chunk whose output `chunk` receives; None for the first chunk of the model."""
        return None if chunk % self.chunks_per_copy == 0 else chunk - 1

    def next(self, chunk: int) -> int | None:
        """The chunk that receives the output of `chunk`; None for the last chunk of the model."""
        return None if (chunk + 1) % self.chunks_per_copy == 0 else chunk + 1

    def microbatches(self, chunk: int) -> range:
        """Microbatches that go through `chunk`: all of them, or one half per copy of the model."""
        copy = chunk // self.chunks_per_copy
        return range(
            copy * self.num_microbatches // self.num_copies,
            (copy + 1) * self.num_microbatches // self.num_copies,
        )


@dataclass(frozen=True)
class Program:
    """Everything every rank does in one step (or one evaluation pass)."""

    schedule: str
    num_microbatches: int
    chunk_rank: tuple[int, ...]
    chunks: tuple[ChunkShape, ...]
    actions: tuple[tuple[Action, ...], ...]
    training: bool = True
    num_copies: int = 1
    """2 when the chunks hold two copies of the model (see `CoarseSchedule`)."""

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @property
    def layout(self) -> Layout:
        return Layout(self.chunk_rank, self.num_microbatches, self.num_copies)

    @property
    def links(self) -> tuple[tuple[int, int], ...]:
        """Ordered pairs (source, destination) of pipeline ranks that exchange messages."""
        return tuple(
            sorted(
                {
                    (rank, action.peer)
                    for rank, actions in enumerate(self.actions)
                    for action in actions
                    if action.kind is ActionKind.SEND and action.peer is not None
                }
            )
        )

    def text(self) -> str:
        """One action a line, rank by rank: what golden files hold and what the digest covers."""
        lines = [
            f"program {self.schedule} ranks={self.num_ranks} microbatches={self.num_microbatches}"
            f" chunk_rank={','.join(map(str, self.chunk_rank))} copies={self.num_copies}"
            f" training={self.training}"
        ]
        for index, chunk in enumerate(self.chunks):
            lines.append(f"chunk {index}")
            lines.extend(f"  {item}" for item in chunk.items)
        for rank, actions in enumerate(self.actions):
            lines.append(f"rank {rank}")
            lines.extend(f"  {action}" for action in actions)
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """A hash that ranks compare before step 1: two ranks with different programs would hang."""
        return hashlib.blake2b(self.text().encode(), digest_size=16).hexdigest()
