"""Coarse schedules on a clock with unit costs and free communication. Standard library only.

One unit is the forward of a rank's whole share of the model. Times are exact fractions, so figures can be
compared with published formulas without tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mhc_dist.pipeline.action import Layout
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot


@dataclass(frozen=True)
class UnitCosts:
    """Per rank and microbatch: forward, input gradient, weight gradient, and recompute before a backward.

    A pair hides recompute, because its windows hold it; elsewhere recompute is serial.
    """

    forward: Fraction = Fraction(1)
    input_gradient: Fraction = Fraction(1)
    weight_gradient: Fraction = Fraction(1)
    recompute: Fraction = Fraction(0)
    hide_recompute_in_pairs: bool = True


@dataclass(frozen=True)
class UnitCostResult:
    """What a schedule costs. `peak_live_microbatches` counts a rank's whole share of one microbatch as 1."""

    makespan: Fraction
    idle_per_rank: tuple[Fraction, ...]
    peak_live_microbatches: tuple[Fraction, ...]
    slots: tuple[tuple[TimedSlot, ...], ...]


@dataclass(frozen=True, slots=True)
class TimedSlot:
    slot: Slot
    start: Fraction
    end: Fraction


def run_unit_costs(schedule: CoarseSchedule, costs: UnitCosts) -> UnitCostResult:
    """Every rank runs its slots in order, each as soon as its inputs exist; a pair starts when both can.

    Raises ValueError naming the stuck slot if the ranks wait in a circle.
    """
    layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
    share = Fraction(schedule.num_ranks * schedule.num_copies, len(schedule.chunk_rank))
    ends: dict[tuple[OpKind, int, int], Fraction] = {}
    timed: list[list[TimedSlot]] = [[] for _ in schedule.ranks]
    progress = True
    while progress:
        progress = False
        for slots, done in zip(schedule.ranks, timed, strict=True):
            while len(done) < len(slots):
                slot = slots[len(done)]
                ready = _ready(slot, layout, ends)
                if ready is None:
                    break
                start = max(ready, done[-1].end if done else Fraction(0))
                end = start + share * _duration(slot, costs)
                for op in _ops(slot):
                    ends[_result(op)] = end
                done.append(TimedSlot(slot, start, end))
                progress = True
    for rank, (slots, done) in enumerate(zip(schedule.ranks, timed, strict=True)):
        if len(done) < len(slots):
            raise ValueError(f"{schedule.name}: rank {rank} waits for ever in slot {slots[len(done)]}")
    makespan = max(done[-1].end for done in timed)
    idle = tuple(makespan - sum((t.end - t.start for t in done), Fraction(0)) for done in timed)
    return UnitCostResult(
        makespan=makespan,
        idle_per_rank=idle,
        peak_live_microbatches=tuple(share * peak_live(slots) for slots in schedule.ranks),
        slots=tuple(tuple(done) for done in timed),
    )


def peak_live(slots: tuple[Slot, ...]) -> int:
    """Most chunk activations held at once: from a forward to the end of its weight gradients."""
    live = peak = 0
    for slot in slots:
        for op in _ops(slot):
            live += op.kind is OpKind.F
            peak = max(peak, live)
            live -= op.kind in (OpKind.B, OpKind.W)
    return peak


def _ops(slot: Slot) -> tuple[Op, ...]:
    return (slot,) if isinstance(slot, Op) else (slot.forward, slot.backward)


def _result(op: Op) -> tuple[OpKind, int, int]:
    """What an op produces for others: both kinds of backward produce the input's gradient."""
    kind = OpKind.B if op.kind is OpKind.I else op.kind
    return (kind, op.chunk, op.microbatch)


def _needs(op: Op, layout: Layout) -> list[tuple[OpKind, int, int]]:
    match op.kind:
        case OpKind.F:
            previous = layout.previous(op.chunk)
            return [] if previous is None else [(OpKind.F, previous, op.microbatch)]
        case OpKind.W:
            return [(OpKind.B, op.chunk, op.microbatch)]
        case OpKind.B | OpKind.I:
            following = layout.next(op.chunk)
            own = [(OpKind.F, op.chunk, op.microbatch)]
            return own if following is None else [*own, (OpKind.B, following, op.microbatch)]


def _ready(slot: Slot, layout: Layout, ends: dict[tuple[OpKind, int, int], Fraction]) -> Fraction | None:
    ready = Fraction(0)
    for op in _ops(slot):
        for need in _needs(op, layout):
            if need not in ends:
                return None
            ready = max(ready, ends[need])
    return ready


def _duration(slot: Slot, costs: UnitCosts) -> Fraction:
    total = Fraction(0)
    for op in _ops(slot):
        match op.kind:
            case OpKind.F:
                total += costs.forward
            case OpKind.W:
                total += costs.weight_gradient
            case OpKind.I:
                total += costs.input_gradient + costs.recompute
            case OpKind.B:
                total += costs.input_gradient + costs.weight_gradient + costs.recompute
    if not isinstance(slot, Op) and costs.hide_recompute_in_pairs:
        total -= costs.recompute
    return total
