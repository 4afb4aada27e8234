"""The order of one pipeline rank's actions: slot after slot, and what moves from one slot to another.

Standard library only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain, zip_longest

from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Pass
from mhc_dist.pipeline.cost import CostTable, bytes_at_end, bytes_at_start
from mhc_dist.pipeline.flow import ChunkFlow
from mhc_dist.pipeline.lower_pass import boundary
from mhc_dist.pipeline.merge_slots import Group
from mhc_dist.pipeline.op_graph import OpGraph, backward_graph, forward_graph
from mhc_dist.pipeline.placement import Placement
from mhc_dist.pipeline.run_times import RunTimes
from mhc_dist.pipeline.schedules.coarse import Op, OpKind
from mhc_dist.pipeline.slot import Filler, Guest, Slot, Step, Unit
from mhc_dist.pipeline.slot_choice import Order, SlotChooser

RECEIVE_BUFFERS = 4
"""Posted receives that a memory budget leaves room for: two directions, each one in use and one ahead."""


_Key = tuple[object, ...]


class RankPlacer:
    """Places ranks one by one; results of equal slots are shared between microbatches."""

    def __init__(
        self, chunks: tuple[ChunkShape, ...], layout: Layout, costs: CostTable, placement: Placement
    ) -> None:
        self._layout = layout
        self._costs = costs
        self._placement = placement
        self._chooser = SlotChooser(
            costs,
            placement.wire_margin,
            late_recompute=not placement.prefetch_recompute,
            thorough=placement.thorough,
        )
        flows = [ChunkFlow(shape) for shape in chunks]
        self._forward = [forward_graph(flow) for flow in flows]
        self._backward = [backward_graph(flow) for flow in flows]
        self._has_exchange = [
            any(
                max(costs.exchanges[c, e.name].forward, costs.exchanges[c, e.name].backward) > 0
                for e in flow.exchanges
            )
            for c, flow in enumerate(flows)
        ]
        self._slots: dict[_Key, Order] = {}
        self._bytes: dict[tuple[int, bool, bool], int] = {}

    @property
    def has_exchanges(self) -> bool:
        return any(self._has_exchange)

    def place_rank(self, rank: int, groups: Sequence[Group], times: RunTimes | None = None) -> list[Action]:
        """All actions of one rank, without receives, FREE, REDUCE and STEP.

        times: of a run of the same groups; with it, a forward of the next slot may begin in gaps of a slot if
        in that run its input was there when the slot started. None: slots begin when the one before is over.
        """
        state = _RankState(self._costs.static_bytes[rank] if self._costs.static_bytes else 0)
        upcoming = deque(op for group in groups for op in group.ops if op.kind in (OpKind.B, OpKind.I))
        start = 0.0
        for group, following in zip_longest(groups, groups[1:]):
            if group.is_weights:
                self._finish_weights(state, group.first)
                continue
            for op in group.ops:
                if op.kind in (OpKind.B, OpKind.I):
                    upcoming.remove(op)
            next_backward = upcoming[0] if upcoming else None
            guest = None
            if times is not None and following is not None:
                guest = self._guest(state, group, following, times, start)
                # The next slot started later than this: weight gradients may have come in between.
                start = max(times.end(op) for op in group.ops)
            self._place_slot(state, group, next_backward, guest)
        return state.actions

    def _guest(
        self, state: _RankState, group: Group, following: Group, times: RunTimes, start: float
    ) -> tuple[Op, Guest] | None:
        """The first forward of the next slot, if its input will be there.

        Safe for the reason that merged slots are (`merge_slots`): what moves into this slot needs nothing
        that in the known run came after its start, but what this slot itself has handed on before. start: of
        this slot, or earlier.
        """
        op = next((op for op in following.ops if op.kind is OpKind.F), None)
        if op is None or following.ordered or group.ordered or len(group.ops) < 2:
            return None
        if not self._has_exchange[op.chunk]:  # nothing that would stop it short of its end
            return None
        unit = self._unit(state, op)
        for position, own in enumerate(group.ops):
            if own.kind is OpKind.F and (own.microbatch, self._layout.next(own.chunk)) == (
                op.microbatch,
                op.chunk,
            ):
                return op, Guest(unit, after=position)
        return (op, Guest(unit)) if times.ready(op) <= start else None

    def _unit(self, state: _RankState, op: Op) -> Unit:
        if op.kind is OpKind.F:
            fresh = Unit(op.chunk, self._forward[op.chunk], False, False, False)
            return state.begun.pop((op.chunk, op.microbatch), fresh)
        graph = self._backward[op.chunk]
        deferred = op.kind is OpKind.I
        done = state.recomputed.pop((op.chunk, op.microbatch), set())
        finished = frozenset(
            position
            for position, node in enumerate(graph.nodes)
            if node.kind is ActionKind.RECOMPUTE and node.item in done
        )
        keeps = not deferred and self._placement.split_weights and self._has_exchange[op.chunk]
        return Unit(op.chunk, graph, True, deferred or keeps, keeps, finished)

    def _place_slot(
        self,
        state: _RankState,
        group: Group,
        next_backward: Op | None,
        invited: tuple[Op, Guest] | None,
    ) -> None:
        units = tuple(self._unit(state, op) for op in group.ops)
        ops, guest = group.ops, None
        if invited is not None:
            ops, guest = (*ops, invited[0]), invited[1]
        prefetch = self._prefetch(state, next_backward)
        put_off = list(state.put_off)
        queues = [[filler for filler, _ in put_off], prefetch]
        headroom = None
        if self._placement.memory_budget is not None:
            receive_buffers = RECEIVE_BUFFERS * self._costs.message.payload_bytes
            headroom = self._placement.memory_budget - state.live - receive_buffers
            # Ample memory is all alike, so that such slots share their result.
            everyone = units if guest is None else (*units, guest.unit)
            most = sum(map(self._most_bytes, everyone)) + sum(map(self._filler_bytes, chain(*queues)))
            if headroom >= most:
                headroom = None
        whole_pair = not group.ordered and len(units) == 2 and any(unit.keeps_weights for unit in units)
        late_counts = self._placement.late_counts and whole_pair
        key: _Key = (
            tuple(map(_kind_of, units)),
            None if guest is None else (_kind_of(guest.unit), guest.after),
            tuple(map(tuple, queues)),
            headroom,
            group.ordered,
            group.after,
        )
        if key not in self._slots:
            slot = Slot(units, queues, headroom, group.ordered, group.after, late_counts, guest)
            self._slots[key] = self._chooser.order(slot)
        order = self._slots[key]
        if order.begun is not None:
            state.begun[ops[-1].chunk, ops[-1].microbatch] = order.begun
        taken = [0, 0]
        for step in order.steps:
            if step.source < len(ops):
                self._emit(state, ops[step.source], step)
                continue
            queue = step.source - len(ops)
            if queue == 0:
                filler, microbatch = put_off[taken[0]]
                state.put_off.popleft()
            else:
                assert next_backward is not None
                filler, microbatch = prefetch[taken[1]], next_backward.microbatch
                state.recomputed.setdefault((filler.chunk, microbatch), set()).add(filler.item)
            taken[queue] += 1
            self._append(state, Action(filler.kind, filler.chunk, microbatch, filler.item))
        weights_done = {(s.source, s.item) for s in order.steps if s.kind is ActionKind.WEIGHT}
        for unit_index, (op, unit) in enumerate(zip(group.ops, units, strict=True)):
            if op.kind is OpKind.I:
                state.put_off.extend(
                    (Filler(ActionKind.WEIGHT, op.chunk, node.item), op.microbatch)
                    for node in unit.graph.nodes
                    if node.kind is ActionKind.GRADIENT
                    and node.has_weights
                    and (unit_index, node.item) not in weights_done
                )
            if op.kind is OpKind.F:
                state.forwarded.add((op.chunk, op.microbatch))

    def _most_bytes(self, unit: Unit) -> int:
        """What a pass can add to live memory if nothing is given back meanwhile."""
        key = (unit.chunk, unit.is_backward, unit.split_weights)
        if key not in self._bytes:
            actions = [
                Action(
                    node.kind,
                    unit.chunk,
                    0,
                    node.item,
                    node.direction,
                    defer_weights=node.kind is ActionKind.GRADIENT
                    and unit.split_weights
                    and node.has_weights,
                )
                for node in unit.graph.nodes
            ]
            self._bytes[key] = sum(bytes_at_start(action, self._costs) for action in actions)
        return self._bytes[key]

    def _filler_bytes(self, filler: Filler) -> int:
        return bytes_at_start(Action(filler.kind, filler.chunk, 0, filler.item), self._costs)

    def _prefetch(self, state: _RankState, op: Op | None) -> list[Filler]:
        """What the next backward will have to recompute, if its forward has run."""
        if op is None or not self._placement.prefetch_recompute:
            return []
        if (op.chunk, op.microbatch) not in state.forwarded:
            return []
        done = state.recomputed.get((op.chunk, op.microbatch), set())
        return [
            Filler(ActionKind.RECOMPUTE, op.chunk, item)
            for item in _last_block_first(self._backward[op.chunk])
            if item not in done
        ]

    def _emit(self, state: _RankState, op: Op, step: Step) -> None:
        direction = Pass.FORWARD if op.kind is OpKind.F else Pass.BACKWARD
        if step.kind in (ActionKind.ARRIVE, ActionKind.SEND):
            arriving = step.kind is ActionKind.ARRIVE
            action = boundary(self._layout, op.chunk, op.microbatch, direction, arriving=arriving)
            if action is None:
                return
        else:
            action = Action(
                step.kind,
                op.chunk,
                op.microbatch,
                step.item,
                step.direction,
                defer_weights=step.defer_weights,
            )
        self._append(state, action)

    def _append(self, state: _RankState, action: Action) -> None:
        state.actions.append(action)
        if action.kind is not ActionKind.ARRIVE:  # receive buffers are set aside (RECEIVE_BUFFERS)
            state.live += bytes_at_start(action, self._costs) - bytes_at_end(action, self._costs)

    def _finish_weights(self, state: _RankState, op: Op) -> None:
        """The W slot of the schedule: whatever of it no gap has taken yet."""
        kept: deque[tuple[Filler, int]] = deque()
        for filler, microbatch in state.put_off:
            if (filler.chunk, microbatch) == (op.chunk, op.microbatch):
                self._append(state, Action(ActionKind.WEIGHT, filler.chunk, microbatch, filler.item))
            else:
                kept.append((filler, microbatch))
        state.put_off = kept


class _RankState:
    """What a rank carries from slot to slot."""

    def __init__(self, static_bytes: int) -> None:
        self.actions: list[Action] = []
        self.live = static_bytes
        self.put_off: deque[tuple[Filler, int]] = deque()
        self.recomputed: dict[tuple[int, int], set[str]] = {}
        self.forwarded: set[tuple[int, int]] = set()
        self.begun: dict[tuple[int, int], Unit] = {}


def _kind_of(unit: Unit) -> _Key:
    """Units alike in this are placed alike."""
    return (
        unit.chunk,
        unit.is_backward,
        unit.split_weights,
        unit.keeps_weights,
        unit.finished,
        unit.flying,
        unit.has_arrived,
    )


def _last_block_first(graph: OpGraph) -> list[str]:
    """Phases to recompute, in an order that respects blocks and begins with what the backward needs first."""
    order: list[str] = []
    nodes = graph.nodes

    def visit(position: int) -> None:
        node = nodes[position]
        if node.kind is ActionKind.RECOMPUTE and node.item not in order:
            for need in node.needs:
                visit(need)
            order.append(node.item)

    for node in nodes:
        if node.kind is ActionKind.GRADIENT:
            for need in node.needs:
                visit(need)
    return order
