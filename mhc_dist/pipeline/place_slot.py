"""List scheduling of one slot: which compute action runs next while exchanges are in flight.

Standard library only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf

from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.cost import CostTable, bytes_at_end, bytes_at_start
from mhc_dist.pipeline.op_graph import Node, tails
from mhc_dist.pipeline.slot import Slot, Step, Unit

TINY_SECONDS = 1e-12
"""Breaks ties between what could start now: first what needs no message, and recomputation last while no
exchange is in flight in a pair, because it could run under the exchange that something else starts."""

PATIENCE = 0.25
"""An exchange that needs a short one first (the counts before the rows) is worth waiting this much of its own
time for: issued later, it would miss the compute that could have hidden it."""

OVERSHOOT = 0.1
"""In an ordered slot a later pass may delay an earlier one by this share of the phase it runs in its gap."""

NUM_OPEN = 2
"""Passes of an ordered slot that are under way at the same time."""


class SlotScheduler:
    """Builds the steps of one slot, whose times start at 0.

    late_recompute: recomputation right before its use. guest_gap: a gap of this share of the guest's next
    phase lets that begin in it; None keeps the guest out.
    """

    def __init__(
        self, slot: Slot, costs: CostTable, *, late_recompute: bool = False, guest_gap: float | None = None
    ) -> None:
        self.slot = slot
        self.units = slot.units
        self.costs = costs
        self.late_recompute = late_recompute
        self.guest_gap = guest_gap
        self.steps: list[Step] = []

    def run(self) -> list[Step]:
        """All steps of the slot, in order."""
        self._now = 0.0
        self._live = 0
        self._lane_free: dict[str, float] = {}
        self._done: list[set[int]] = [set(unit.finished) for unit in self.units]
        self._flying: list[dict[int, float]] = [dict(unit.flying) for unit in self.units]
        self._left: list[bool] = [False for _ in self.units]
        self._arrived: list[bool] = [unit.has_arrived for unit in self.units]
        self._weights: list[tuple[int, str]] = []
        self._own_put_off: list[tuple[int, str]] = []
        self._complete = [False for _ in self.units]
        self._taken = [0 for _ in self.slot.queues]
        self._tails = [tails(unit.graph, partial(self._node_seconds, unit)) for unit in self.units]
        self._take_over_lanes()
        self._issue_ready()
        while True:
            best = self._best_candidate()
            if best is None:
                break
            start, unit, position = best
            if start > self._now + 3 * TINY_SECONDS and self._fill(start - self._now):
                continue
            self._run_node(unit, position)
        while self._weights:
            self._run_weight(0)
        for unit in range(len(self.slot.own)):
            for position in list(self._flying[unit]):
                self._wait(unit, position)
            self._leave_if_complete(unit)
        return self.steps

    @property
    def seconds(self) -> float:
        """After `run`: how long the slot takes."""
        return self._now

    @property
    def begun(self) -> Unit | None:
        """After `run`: the guest with what is done of it, in this slot's time; None if it did not begin."""
        guest = self.slot.guest
        if guest is None or self._done[-1] == guest.unit.finished:
            return None
        return replace(guest.unit, finished=frozenset(self._done[-1]), has_arrived=self._arrived[-1])

    def _take_over_lanes(self) -> None:
        for unit in self.units:
            for position, end in unit.flying:
                lane = self.costs.lane(self._node_action(unit, unit.graph.nodes[position]))
                self._lane_free[lane] = max(end, self._lane_free.get(lane, 0.0))

    def _node_action(self, unit: Unit, node: Node) -> Action:
        defer = node.kind is ActionKind.GRADIENT and unit.split_weights and node.has_weights
        return Action(node.kind, unit.chunk, 0, node.item, node.direction, defer_weights=defer)

    def _node_seconds(self, unit: Unit, node: Node) -> float:
        action = self._node_action(unit, node)
        return self.costs.wire_seconds(action) if node.is_exchange else self.costs.seconds(action)

    def _best_candidate(self) -> tuple[float, int, int] | None:
        """The node that can start first; among equals the most urgent. Respects memory if possible."""
        best: tuple[tuple[bool, float, float, int, int], float] | None = None
        opened = 0
        limit = inf
        landing = max((end for flying in self._flying for end in flying.values()), default=0.0)
        for u, unit in enumerate(self.slot.own):
            done, flying = self._done[u], self._flying[u]
            if self.slot.ordered:
                if self._complete[u]:
                    continue
                if opened == NUM_OPEN or not all(self._left[: self.slot.after[u]]):
                    break
                if opened and best is not None:
                    limit = best[1]
                opened += 1
            for position, node in enumerate(unit.graph.nodes):
                if position in done or position in flying:
                    continue
                if self.late_recompute and node.kind is ActionKind.RECOMPUTE:
                    continue
                start = self._now
                for need in self._needs(unit, node):
                    if need in flying:
                        start = max(start, flying[need])
                    elif need not in done:
                        break
                else:
                    if node.needs_arrival and not self._arrived[u]:
                        start += TINY_SECONDS
                    if node.kind is ActionKind.RECOMPUTE and len(self.slot.own) > 1:
                        # Counts in flight are no cover for it: half of it has to lie under a flight.
                        covered_until = self._now + 0.5 * self._node_seconds(unit, node)
                        start += 2 * TINY_SECONDS * (landing < covered_until)
                    if limit < inf:
                        seconds = self._node_seconds(unit, node)
                        if start + (1 - OVERSHOOT) * seconds > limit + 3 * TINY_SECONDS:
                            continue
                    too_big = not self._fits(self._node_action(unit, node))
                    rank = (too_big, start, -self._tails[u][position], u, position)
                    if best is None or rank < best[0]:
                        best = (rank, start)
        return None if best is None else (best[1], best[0][3], best[0][4])

    def _needs(self, unit: Unit, node: Node) -> tuple[int, ...]:
        if not self.late_recompute:
            return node.needs
        kinds = (unit.graph.nodes[need].kind for need in node.needs)
        return tuple(n for n, kind in zip(node.needs, kinds, strict=True) if kind is not ActionKind.RECOMPUTE)

    def _fits(self, action: Action) -> bool:
        return (
            self.slot.headroom is None
            or self._live + bytes_at_start(action, self.costs) <= self.slot.headroom
        )

    def _run_action(self, source: int, action: Action) -> None:
        self.steps.append(Step(source, action.kind, action.item, action.direction, action.defer_weights))
        self._now += self.costs.seconds(action)
        self._live += bytes_at_start(action, self.costs) - bytes_at_end(action, self.costs)

    def _run_node(self, u: int, position: int) -> None:
        unit = self.units[u]
        node = unit.graph.nodes[position]
        if self.late_recompute:
            for need in node.needs:
                self._recompute_late(u, need)
        for need in node.needs:
            self._wait(u, need)
        if node.needs_arrival:
            self._arrive(u)
        action = self._node_action(unit, node)
        if node.is_exchange:
            self._issue(u, position, action)
            return
        self._run_action(u, action)
        self._done[u].add(position)
        if action.defer_weights:
            (self._weights if unit.keeps_weights else self._own_put_off).append((u, node.item))
        if len(self._done[u]) + len(self._flying[u]) == len(unit.graph.nodes):
            self._complete[u] = True
        self._issue_ready()
        self._leave_if_complete(u)

    def _recompute_late(self, u: int, position: int) -> None:
        node = self.units[u].graph.nodes[position]
        if node.kind is ActionKind.RECOMPUTE and position not in self._done[u]:
            for need in node.needs:
                self._recompute_late(u, need)
            self._run_action(u, self._node_action(self.units[u], node))
            self._done[u].add(position)

    def _arrive(self, u: int) -> None:
        if not self._arrived[u]:
            self._arrived[u] = True
            self.steps.append(Step(u, ActionKind.ARRIVE))

    def _issue_ready(self) -> None:
        """Start every exchange whose data is there, or is about to be (see PATIENCE)."""
        for u, unit in enumerate(self.units):
            for position, node in enumerate(unit.graph.nodes):
                if not node.is_exchange or position in self._done[u] or position in self._flying[u]:
                    continue
                if node.needs_arrival and not self._arrived[u]:
                    continue
                action = self._node_action(unit, node)
                patience = self._now
                if not self.slot.late_counts:
                    patience += PATIENCE * self.costs.wire_seconds(action)
                flying, done = self._flying[u], self._done[u]
                if all(need in done or flying.get(need, inf) <= patience for need in node.needs):
                    for need in node.needs:
                        self._wait(u, need)
                    self._issue(u, position, action)

    def _issue(self, u: int, position: int, action: Action) -> None:
        lane = self.costs.lane(action)
        begin = max(self._now, self._lane_free.get(lane, 0.0))
        self._lane_free[lane] = begin + self.costs.wire_seconds(action)
        self._flying[u][position] = self._lane_free[lane]
        self._live += bytes_at_start(action, self.costs)
        self.steps.append(Step(u, ActionKind.ISSUE, action.item, action.direction))

    def _wait(self, u: int, position: int) -> None:
        """Complete an exchange if it is in flight."""
        end = self._flying[u].pop(position, None)
        if end is None:
            return
        node = self.units[u].graph.nodes[position]
        self._now = max(self._now, end)
        self._done[u].add(position)
        action = Action(ActionKind.WAIT, self.units[u].chunk, 0, node.item, node.direction)
        self._live -= bytes_at_end(action, self.costs)
        self.steps.append(Step(u, ActionKind.WAIT, node.item, node.direction))

    def _leave_if_complete(self, u: int) -> None:
        if not self._left[u] and all(need in self._done[u] for need in self.units[u].graph.leaves_after):
            self._left[u] = True
            self.steps.append(Step(u, ActionKind.SEND))

    def _run_weight(self, position: int) -> None:
        u, item = self._weights.pop(position)
        self._run_action(u, Action(ActionKind.WEIGHT, self.units[u].chunk, 0, item))

    def _fill(self, gap: float) -> bool:
        """Run one filler in a gap, if one fits it or overshoots by no more than half of itself."""
        choices: list[tuple[float, int]] = []
        for position, (u, item) in enumerate(self._weights):
            action = Action(ActionKind.WEIGHT, self.units[u].chunk, 0, item)
            choices.append((self.costs.seconds(action), position))
        fitting = [choice for choice in choices if choice[0] <= gap]
        if fitting:
            self._run_weight(max(fitting, key=lambda c: (c[0], -c[1]))[1])
            return True
        if not choices and self._run_own_put_off(gap):
            return True
        queued = self._queued_fillers()
        for seconds, queue, action in queued:
            if seconds <= gap:
                self._take(queue, action)
                return True
        if choices and min(choices)[0] <= 2 * gap:
            self._run_weight(min(choices)[1])
            return True
        for seconds, queue, action in queued:
            if seconds <= 2 * gap:
                self._take(queue, action)
                return True
        return self._run_guest(gap)

    def _run_guest(self, gap: float) -> bool:
        """The guest's next phase. It only moves to an earlier time, so it may overshoot the gap."""
        guest = self.slot.guest
        if guest is None or self.guest_gap is None:
            return False
        if guest.after is not None and not self._left[guest.after]:
            return False
        u = len(self.slot.own)
        for position, node in enumerate(guest.unit.graph.nodes):
            if node.is_exchange:
                return False
            if position not in self._done[u]:
                action = self._node_action(guest.unit, node)
                if gap < self.guest_gap * self.costs.seconds(action) or not self._fits(action):
                    return False
                self._run_node(u, position)
                return True
        return False

    def _run_own_put_off(self, gap: float) -> bool:
        """A weight gradient that this slot put off, once earlier ones are done: sums keep their order."""
        if not self._own_put_off or (self.slot.queues and self._taken[0] < len(self.slot.queues[0])):
            return False
        u, item = self._own_put_off[0]
        action = Action(ActionKind.WEIGHT, self.units[u].chunk, 0, item)
        if self.costs.seconds(action) > 2 * gap:
            return False
        self._own_put_off.pop(0)
        self._run_action(u, action)
        return True

    def _queued_fillers(self) -> list[tuple[float, int, Action]]:
        result = []
        for queue, fillers in enumerate(self.slot.queues):
            if self._taken[queue] < len(fillers):
                filler = fillers[self._taken[queue]]
                action = Action(filler.kind, filler.chunk, 0, filler.item)
                if self._fits(action):
                    result.append((self.costs.seconds(action), queue, action))
        return result

    def _take(self, queue: int, action: Action) -> None:
        self._taken[queue] += 1
        self._run_action(len(self.units) + queue, action)
