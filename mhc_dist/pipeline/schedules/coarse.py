"""Coarse schedules: which whole forward or backward each rank runs, in order. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OpKind(StrEnum):
    """F forward; B full backward; I input-gradient half of B; W weight-gradient half of B."""

    __hash__ = str.__hash__  # in C: passes are looked up by the million

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the field's name for it
    W = "W"


@dataclass(frozen=True, slots=True)
class Op:
    """One whole pass of one microbatch through one chunk."""

    kind: OpKind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind.value}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward and a backward that run side by side: one computes while the other communicates."""

    forward: Op
    backward: Op

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


Slot = Op | Pair


@dataclass(frozen=True)
class CoarseSchedule:
    """`ranks[r]` is what rank r runs; `chunk_rank[c]` owns chunk c; chunks are numbered in model order.

    With `num_copies` 2 the model exists twice: the second half of the chunks repeats the first half on other
    ranks, and the second half of the microbatches goes through it.
    """

    name: str
    num_microbatches: int
    chunk_rank: tuple[int, ...]
    ranks: tuple[tuple[Slot, ...], ...]
    num_copies: int = 1

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def text(self) -> str:
        """One line per rank: what golden files hold."""
        return "\n".join(" ".join(map(str, slots)) for slots in self.ranks) + "\n"
