"""What placement may do, and how careful it is. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

WIRE_MARGIN = 1.35
"""Passes that run side by side are ordered for exchanges as told and for ones that take this much longer. A
late peer or a busy link then still finds work to hide behind."""

CAUTION = 0.02
"""A margin may cost this share of a step, by which costs are uncertain anyway."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What placement may do. Switch parts off to measure what they bring.

    memory_budget: bytes a rank may hold, static ones included; None for no limit. prefetch_recompute: False
    recomputes right before each use, as others do. merge_slots: also run passes side by side that the
    schedule does not pair, where a simulated run says that it pays. wire_margin: see WIRE_MARGIN. thorough:
    slots are ordered for wires of more speeds, and every program is made once more, so that a pass of the
    next slot may begin in a gap, where a simulated run says that it pays. Without merge_slots it orders for
    more speeds alone: to begin a pass in another slot's gap is to merge a part of that slot. It takes several
    times as long.
    late_counts: in pairs, a phase runs between an exchange of token counts and the wait for it. Otherwise
    each is a place where all ranks of an expert group have to be at once; but rows leave a phase later.
    """

    memory_budget: int | None = None
    split_weights: bool = True
    prefetch_recompute: bool = True
    merge_slots: bool = True
    wire_margin: float = WIRE_MARGIN
    late_counts: bool = False
    thorough: bool = False
