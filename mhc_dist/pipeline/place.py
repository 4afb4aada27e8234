"""Placement: the order in which each rank runs its phases, chosen by cost. Standard library only.

Within a slot, phases of the paired microbatches alternate so that one computes while the other's exchange is
in flight (`place_slot`). Gaps that remain are filled with weight gradients, and with the recomputation that
the rank's next backward will need. Deterministic, and equal on all ranks of an expert group, because it
decides per pipeline rank from the same costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Pass, Program
from mhc_dist.pipeline.cost import CostTable, bytes_at_end, bytes_at_start, with_slower_wires
from mhc_dist.pipeline.flow import ChunkFlow
from mhc_dist.pipeline.lower import END_OF_STEP, ops_of
from mhc_dist.pipeline.lower_pass import boundary
from mhc_dist.pipeline.merge_slots import Group, merge_slots
from mhc_dist.pipeline.op_graph import OpGraph, backward_graph, forward_graph
from mhc_dist.pipeline.place_slot import Filler, SlotScheduler, Step, Unit
from mhc_dist.pipeline.receives import COMPUTE_KINDS, post_receives
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind
from mhc_dist.pipeline.simulate import Simulation

TICKS_PER_SECOND = 1_000_000_000

WIRE_MARGIN = 1.35
"""In a pair with weight gradients to fill gaps with, exchanges are placed as if they took this much longer. A
late peer or a busy link then still finds work to hide behind. Where exchanges take as long as compute, there
is no work to spare, and the margin can cost a tenth of a step: see `place_best`."""

WIRE_BOUND = 0.9
"""A pair whose exchanges take this share of its compute is as slow as its link: no window is to spare."""

CAUTION = 0.02
"""A margin may cost this share of a step, by which costs are uncertain anyway."""

TIE = 0.005
"""Programs this close in time are alike, costs being no better known: the one that waits least for exchanges
depends on them least."""

RECEIVE_BUFFERS = 4
"""Posted receives that a memory budget leaves room for: two directions, each one in use and one ahead."""


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


def place(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placement: Placement | None = None,
) -> Program:
    """Lower `schedule` over `chunks` in the order that `costs` make best."""
    return place_and_simulate(schedule, chunks, costs, placement)[0]


def place_best(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placement: Placement | None = None,
) -> tuple[Program, Simulation]:
    """The safest of three placements that costs next to nothing: counts awaited late; as `place`; and without
    a margin for slower links.

    For runs, which then never get a much slower program than the planner found for them; the planner itself
    saves the time. What is safe costs nothing where no rank waits for exchanges all the same: no second
    attempt. Costs that know how phases differ tell which one really is the fastest.
    """
    placement = placement or Placement()
    if placement.wire_margin == 1.0:
        return place_and_simulate(schedule, chunks, costs, placement)
    safest = place_and_simulate(schedule, chunks, costs, replace(placement, late_counts=True))
    waiting = max(rank.blocked(ActionKind.WAIT) for rank in safest[1].ranks)
    if costs.jitter is None and waiting <= CAUTION * safest[1].makespan and _fits(safest[1], placement):
        return safest
    others = (placement, replace(placement, wire_margin=1.0))
    runs = [safest, *(place_and_simulate(schedule, chunks, costs, other) for other in others)]
    runs = [run for run in runs if _fits(run[1], placement)] or runs
    if costs.jitter is None:
        seconds, allowed = [simulation.makespan for _, simulation in runs], CAUTION
    else:
        seconds, allowed = [Simulation(program, costs).makespan for program, _ in runs], TIE
    return next(run for run, one in zip(runs, seconds, strict=True) if one <= (1 + allowed) * min(seconds))


def place_and_simulate(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placement: Placement | None = None,
) -> tuple[Program, Simulation]:
    """As `place`, with the run of the result, which was needed to choose it.

    That run is of phases that all last their cost: what ran side by side in it may run side by side.
    """
    if len(chunks) != len(schedule.chunk_rank):
        raise ValueError(f"{len(chunks)} chunks given, but the schedule lays out {len(schedule.chunk_rank)}.")
    placement = placement or Placement()
    costs = replace(costs, jitter=None)
    layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
    placer = _Placer(chunks, layout, costs, placement)
    groups = [[Group(ops_of(slot)) for slot in slots] for slots in schedule.ranks]
    program = _assemble(schedule, chunks, costs, placer, groups)
    simulation = Simulation(program, costs)
    if not placement.merge_slots or not placer.has_exchanges:
        return program, simulation
    runs = [(program, simulation)]
    for ordered in (False, True):
        joined = merge_slots(groups, program, simulation, ordered=ordered)
        if joined != groups:
            other = _assemble(schedule, chunks, costs, placer, joined)
            runs.append((other, Simulation(other, costs)))
    return _best(runs, placement)


def _fits(simulation: Simulation, placement: Placement) -> bool:
    budget = placement.memory_budget
    return budget is None or max(rank.peak_bytes for rank in simulation.ranks) <= budget


def _best(runs: Sequence[tuple[Program, Simulation]], placement: Placement) -> tuple[Program, Simulation]:
    """Of those within memory (of all, if none is) the fastest; of equals (TIE) the one that waits least."""
    candidates = [run for run in runs if _fits(run[1], placement)] or runs
    fastest = min(simulation.makespan for _, simulation in candidates)
    alike = [run for run in candidates if run[1].makespan <= (1 + TIE) * fastest]
    return min(alike, key=lambda run: sum(rank.blocked(ActionKind.WAIT) for rank in run[1].ranks))


def _assemble(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placer: _Placer,
    groups: Sequence[Sequence[Group]],
) -> Program:
    def duration(action: Action) -> int:
        return max(1, ticks(costs.seconds(action))) if action.kind in COMPUTE_KINDS else 0

    ranks = [_finish_rank(placer.place_rank(rank, own)) for rank, own in enumerate(groups)]
    return Program(
        schedule=schedule.name,
        num_microbatches=schedule.num_microbatches,
        chunk_rank=schedule.chunk_rank,
        chunks=chunks,
        actions=post_receives(ranks, duration, lambda a: ticks(costs.wire_seconds(a)), lead=1),
        num_copies=schedule.num_copies,
    )


def _finish_rank(actions: list[Action]) -> list[Action]:
    """Add FREE after the last action of every (chunk, microbatch), then the end of the step."""
    last = {(action.chunk, action.microbatch): position for position, action in enumerate(actions)}
    result: list[Action] = []
    for position, action in enumerate(actions):
        result.append(action)
        if last[action.chunk, action.microbatch] == position:
            result.append(Action(ActionKind.FREE, action.chunk, action.microbatch))
    return result + END_OF_STEP


def ticks(seconds: float) -> int:
    return round(seconds * TICKS_PER_SECOND)


_Key = tuple[object, ...]


class _Placer:
    """Places ranks one by one; results of equal slots are shared between microbatches."""

    def __init__(
        self, chunks: tuple[ChunkShape, ...], layout: Layout, costs: CostTable, placement: Placement
    ) -> None:
        self._layout = layout
        self._costs = costs
        self._placement = placement
        self._cautious = with_slower_wires(costs, placement.wire_margin)
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
        self._slots: dict[_Key, list[Step]] = {}
        self._bytes: dict[tuple[int, bool, bool], int] = {}

    @property
    def has_exchanges(self) -> bool:
        return any(self._has_exchange)

    def place_rank(self, rank: int, groups: Sequence[Group]) -> list[Action]:
        """All actions of one rank, without receives, FREE, REDUCE and STEP."""
        state = _RankState(self._costs.static_bytes[rank] if self._costs.static_bytes else 0)
        upcoming = deque(op for group in groups for op in group.ops if op.kind in (OpKind.B, OpKind.I))
        for group in groups:
            if group.is_weights:
                self._finish_weights(state, group.first)
                continue
            for op in group.ops:
                if op.kind in (OpKind.B, OpKind.I):
                    upcoming.remove(op)
            next_backward = upcoming[0] if upcoming else None
            self._place_slot(state, group, next_backward)
        return state.actions

    def _unit(self, state: _RankState, op: Op) -> Unit:
        if op.kind is OpKind.F:
            return Unit(op.chunk, self._forward[op.chunk], False, False, False)
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

    def _place_slot(self, state: _RankState, group: Group, next_backward: Op | None) -> None:
        ops = group.ops
        units = tuple(self._unit(state, op) for op in ops)
        prefetch = self._prefetch(state, next_backward)
        put_off = list(state.put_off)
        queues = [[filler for filler, _ in put_off], prefetch]
        headroom = None
        if self._placement.memory_budget is not None:
            receive_buffers = RECEIVE_BUFFERS * self._costs.message.payload_bytes
            headroom = self._placement.memory_budget - state.live - receive_buffers
            # Ample memory is all alike, so that such slots share their result.
            if headroom >= sum(map(self._most_bytes, units)) + sum(map(self._filler_bytes, chain(*queues))):
                headroom = None
        key: _Key = (
            tuple((u.chunk, u.is_backward, u.split_weights, u.keeps_weights, u.finished) for u in units),
            tuple(map(tuple, queues)),
            headroom,
            group.ordered,
        )
        if key not in self._slots:
            self._slots[key] = self._scheduled(units, queues, headroom, ordered=group.ordered)
        taken = [0, 0]
        for step in self._slots[key]:
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
        weights_done = {(s.source, s.item) for s in self._slots[key] if s.kind is ActionKind.WEIGHT}
        for unit_index, (op, unit) in enumerate(zip(ops, units, strict=True)):
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

    def _scheduled(
        self,
        units: tuple[Unit, ...],
        queues: Sequence[Sequence[Filler]],
        headroom: int | None,
        *,
        ordered: bool,
    ) -> list[Step]:
        """The steps of a slot. Recomputation may move, unless its own pair is faster where it waits for its
        use: where exchanges take as long as compute, it must not delay what starts the next one.
        """
        whole_pair = not ordered and len(units) == 2 and any(unit.keeps_weights for unit in units)
        placement = self._placement

        def scheduler(costs: CostTable, *, late: bool) -> SlotScheduler:
            return SlotScheduler(
                units,
                queues,
                costs,
                headroom,
                late_recompute=late,
                ordered=ordered,
                late_counts=placement.late_counts and whole_pair,
            )

        def seconds(*, late: bool) -> float:
            timed = scheduler(self._costs, late=late)
            timed.run()
            return timed.seconds

        late = not placement.prefetch_recompute
        if not late and whole_pair and any(map(_recomputes, units)) and self._is_bound_by_wires(units):
            late = (1 + CAUTION) * seconds(late=True) < seconds(late=False)
        return scheduler(self._cautious if whole_pair else self._costs, late=late).run()

    def _is_bound_by_wires(self, units: Sequence[Unit]) -> bool:
        wires = compute = 0.0
        for unit in units:
            for node in unit.graph.nodes:
                action = Action(node.kind, unit.chunk, 0, node.item, node.direction)
                if node.is_exchange:
                    wires += self._costs.wire_seconds(action)
                elif node.kind is not ActionKind.RECOMPUTE:
                    compute += self._costs.seconds(action)
        return wires >= WIRE_BOUND * compute

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


def _recomputes(unit: Unit) -> bool:
    nodes = unit.graph.nodes
    return any(n.kind is ActionKind.RECOMPUTE and i not in unit.finished for i, n in enumerate(nodes))


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
