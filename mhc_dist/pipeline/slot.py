"""What a slot is made of: passes that run side by side, and what may fill their gaps. Standard library only.

Works on positions, not microbatches, so that equal slots share one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_dist.pipeline.action import ActionKind, Pass
from mhc_dist.pipeline.op_graph import OpGraph


@dataclass(frozen=True, slots=True)
class Unit:
    """One pass of the slot. `finished`: nodes that already ran, as fillers of earlier slots.

    split_weights: GRADIENT leaves its weight half behind. keeps_weights: and this slot has to run them.
    flying: exchanges that an earlier slot started, by node, with the seconds until they land. has_arrived:
    the neighbour's message was awaited there.
    """

    chunk: int
    graph: OpGraph
    is_backward: bool
    split_weights: bool
    keeps_weights: bool
    finished: frozenset[int] = frozenset()
    flying: tuple[tuple[int, float], ...] = ()
    has_arrived: bool = False


@dataclass(frozen=True, slots=True)
class Guest:
    """A forward of the next slot, which may begin in gaps of this one: with phases that need no exchange.

    after: the unit of this slot that hands it its input; None if the input is there when the slot starts.
    """

    unit: Unit
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Filler:
    """Work of another slot that may run in a gap of this one, after the fillers in front of it."""

    kind: ActionKind
    chunk: int
    item: str


@dataclass(frozen=True, slots=True)
class Step:
    """One action of the result. `source` is a unit (the guest after the own ones), or number of units +
    position of a filler queue.
    """

    source: int
    kind: ActionKind
    item: str = ""
    direction: Pass | None = None
    defer_weights: bool = False


@dataclass(frozen=True)
class Slot:
    """What one slot has to do. headroom: memory left at its start, None if ample.

    queues: fillers, each queue to be taken from its front; earlier queues are preferred. The weight gradients
    that this slot's own passes put off come after those of the first queue, and are left over if no gap takes
    them. ordered: units finish one after the other, and a later one only fills the gaps of the first; unit u
    starts once the first after[u] units have handed on what they made.
    late_counts: an exchange that another one needs (the counts before the rows) is awaited after the next
    phase at the earliest, so that a peer may be late by that phase.
    guest: fills gaps that nothing else fills; its exchanges may be in flight when the slot is over.
    """

    own: Sequence[Unit]
    queues: Sequence[Sequence[Filler]]
    headroom: int | None = None
    ordered: bool = False
    after: tuple[int, ...] = ()
    late_counts: bool = False
    guest: Guest | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        """The own ones, then the guest."""
        return (*self.own, *(() if self.guest is None else (self.guest.unit,)))
