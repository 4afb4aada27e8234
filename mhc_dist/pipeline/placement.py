"""What placement may do, and how careful it is. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

WIRE_MARGIN = 1.35
"""In a pair with weight gradients to fill gaps with, exchanges are placed as if they took this much longer. A
late peer or a busy link then still finds work to hide behind. Where exchanges take as long as compute, there
is no work to spare, and the margin can cost a tenth of a step: see `place_best`."""

CAUTION = 0.02
"""A margin may cost this share of a step, by which costs are uncertain anyway."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What placement may do. Switch parts off to measure what they bring.

    memory_budget: bytes a rank may hold, static ones included; None for no limit. prefetch_recompute: False
    recomputes right before each use, as others do. merge_slots: also run passes side by side that the
    schedule does not pair, where a simulated run says that it pays. wire_margin: see WIRE_MARGIN.
    late_counts: in pairs, a phase runs between an exchange of token counts and the wait for it. Otherwise
    each is a place where all ranks of an expert group have to be at once; but rows leave a phase later.
    """

    memory_budget: int | None = None
    split_weights: bool = True
    prefetch_recompute: bool = True
    merge_slots: bool = True
    wire_margin: float = WIRE_MARGIN
    late_counts: bool = False
