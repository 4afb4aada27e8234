"""The order of one slot: of several that list scheduling finds, the one that waits least.

List scheduling takes what can start first, and one phase that came too early can cost a tenth of a slot
where exchanges take as long as compute. Orders for wires of several speeds differ in just such places. Each
is judged by its waits on the wires as told and on slower ones. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.cost import CostTable, with_slower_wires
from mhc_dist.pipeline.place_slot import SlotScheduler
from mhc_dist.pipeline.placement import CAUTION
from mhc_dist.pipeline.slot import Slot, Step, Unit

WIRE_FACTORS = (1.0, 1.1, 1.2, 1.35, 1.5, 1.7, 2.0)
"""Orders are made for wires that take so many times as long as told; while planning, for the first of these
and the margin alone, which finds nearly all of it."""

GUEST_GAPS = (0.1, 0.3, 0.6, 1.0, None)
"""Where the next slot's forward may begin: `SlotScheduler`'s guest_gap."""

WIRE_BOUND = 0.9
"""A pair whose exchanges take this share of its compute is as slow as its link: no window is to spare."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a slot does, in order. begun: its guest, as the next slot finds it."""

    steps: Sequence[Step]
    begun: Unit | None = None


class SlotChooser:
    """Orders slots on the wires of `costs`, and on wires `wire_margin` times as slow.

    late_recompute: recomputation stays right before its use. thorough: for wires of all speeds.
    """

    def __init__(self, costs: CostTable, wire_margin: float, *, late_recompute: bool, thorough: bool) -> None:
        self._costs = costs
        self._factors = dict.fromkeys((wire_margin, *WIRE_FACTORS[: None if thorough else 1]))
        self._slower = {f: with_slower_wires(costs, f) for f in {1.0, *self._factors}}
        self._margin = wire_margin
        self._late_recompute = late_recompute

    def order(self, slot: Slot) -> Order:
        """Recomputation may move, unless the slot waits less where it comes right before its use: where
        exchanges take as long as compute, it must not delay what starts the next one.
        """
        best = self._best(slot, late=self._late_recompute)
        side_by_side = len(slot.own) > 1 and not slot.ordered
        if not self._late_recompute and side_by_side and self._is_bound_by_wires(slot):
            late = self._best(slot, late=True)
            if self._waits(late) + CAUTION * late.seconds < self._waits(best):
                best = late
        return Order(best.steps, self._begun(best))

    def _begun(self, made: SlotScheduler) -> Unit | None:
        """The guest, its exchanges as far as they are on the wires as told."""
        begun = made.begun
        if begun is None:
            return None
        run = Run(made.slot, made.steps, self._costs)
        guest = len(made.slot.own)
        return replace(
            begun,
            flying=tuple(
                (position, max(0.0, run.landing[guest, node.item, node.direction] - run.seconds))
                for position, node in enumerate(begun.graph.nodes)
                if (guest, node.item, node.direction) in run.landing
            ),
        )

    def _best(self, slot: Slot, *, late: bool) -> SlotScheduler:
        best: tuple[float, SlotScheduler] | None = None
        for factor, gap in self._ways(slot):
            made = SlotScheduler(slot, self._slower[factor], late_recompute=late, guest_gap=gap)
            made.run()
            waits = self._waits(made)
            if best is None or waits < best[0]:
                best = waits, made
            if not waits:
                break
        assert best is not None
        return best[1]

    def _ways(self, slot: Slot) -> Iterator[tuple[float, float | None]]:
        """The margin first: what waits nowhere on slower wires is good enough."""
        if len(slot.own) < 2 or slot.ordered:
            yield 1.0, None
            return
        yield from product(self._factors, GUEST_GAPS if slot.guest is not None else (None,))

    def _waits(self, made: SlotScheduler) -> float:
        slot, steps = made.slot, made.steps
        return (
            Run(slot, steps, self._costs).waited + Run(slot, steps, self._slower[self._margin]).waited
        ) / 2

    def _is_bound_by_wires(self, slot: Slot) -> bool:
        wires = compute = 0.0
        recomputes = False
        for unit in slot.own:
            for position, node in enumerate(unit.graph.nodes):
                action = Action(node.kind, unit.chunk, 0, node.item, node.direction)
                if node.is_exchange:
                    wires += self._costs.wire_seconds(action)
                elif node.kind is ActionKind.RECOMPUTE:
                    recomputes |= position not in unit.finished
                else:
                    compute += self._costs.seconds(action)
        return recomputes and wires >= WIRE_BOUND * compute


class Run:
    """`steps` of `slot` on the wires of `costs`.

    seconds: how long they take. waited: of these, for exchanges. landing: when what is still in flight then
    will be there.
    """

    def __init__(self, slot: Slot, steps: Sequence[Step], costs: CostTable) -> None:
        self.seconds = self.waited = 0.0
        self.landing: dict[tuple[int, str, Pass | None], float] = {}
        lanes: dict[str, float] = {}
        units = slot.units
        for u, unit in enumerate(units):
            for position, end in unit.flying:
                node = unit.graph.nodes[position]
                self.landing[u, node.item, node.direction] = end
                lane = costs.lane(Action(node.kind, unit.chunk, 0, node.item, node.direction))
                lanes[lane] = max(end, lanes.get(lane, 0.0))
        taken = [0 for _ in slot.queues]
        for step in steps:
            if step.source < len(units):
                chunk = units[step.source].chunk
            else:
                queue = step.source - len(units)
                chunk = slot.queues[queue][taken[queue]].chunk
                taken[queue] += 1
            key = (step.source, step.item, step.direction)
            if step.kind is ActionKind.WAIT:
                late = max(0.0, self.landing.pop(key) - self.seconds)
                self.waited += late
                self.seconds += late
                continue
            action = Action(step.kind, chunk, 0, step.item, step.direction, defer_weights=step.defer_weights)
            if step.kind is ActionKind.ISSUE:
                lane = costs.lane(action)
                lanes[lane] = max(self.seconds, lanes.get(lane, 0.0)) + costs.wire_seconds(action)
                self.landing[key] = lanes[lane]
            else:
                self.seconds += costs.seconds(action)
