"""Writes the slots of one rank while counting microbatches per chunk and kind. Standard library only."""

from __future__ import annotations

from collections import Counter, deque

from mhc_dist.pipeline.schedules.coarse import Op, OpKind, Pair, Slot


class SlotWriter:
    """Microbatches of a chunk are taken in order, so a schedule only says which chunk comes next.

    `first_microbatch[c]` is where the count of chunk c starts (0 when absent). Weight halves are put off in
    the order of their input-gradient halves.
    """

    def __init__(self, first_microbatch: dict[int, int] | None = None) -> None:
        self.slots: list[Slot] = []
        self._first = first_microbatch or {}
        self._count: Counter[tuple[OpKind, int]] = Counter()
        self._put_off: deque[Op] = deque()

    def _take(self, kind: OpKind, chunk: int) -> Op:
        """The next forward (F) or backward (B or I, which share a count) of `chunk`."""
        counted = OpKind.F if kind is OpKind.F else OpKind.B
        microbatch = self._first.get(chunk, 0) + self._count[counted, chunk]
        self._count[counted, chunk] += 1
        return Op(kind, chunk, microbatch)

    def forward(self, chunk: int) -> None:
        self.slots.append(self._take(OpKind.F, chunk))

    def backward(self, chunk: int) -> None:
        self.slots.append(self._take(OpKind.B, chunk))

    def input_gradient(self, chunk: int) -> None:
        """The I half; its W half waits for `weight_gradient`."""
        op = self._take(OpKind.I, chunk)
        self.slots.append(op)
        self._put_off.append(Op(OpKind.W, op.chunk, op.microbatch))

    def weight_gradient(self) -> None:
        """The W half that has waited longest."""
        self.slots.append(self._put_off.popleft())

    def pair(self, forward_chunk: int, backward_chunk: int) -> None:
        self.slots.append(Pair(self._take(OpKind.F, forward_chunk), self._take(OpKind.B, backward_chunk)))

    @property
    def num_put_off(self) -> int:
        return len(self._put_off)

    def num_forwards(self, chunk: int) -> int:
        return self._count[OpKind.F, chunk]

    def num_backwards(self, chunk: int) -> int:
        return self._count[OpKind.B, chunk]
