"""Placement: the order in which each rank runs its phases, chosen by cost. Standard library only.

Within a slot, phases of the paired microbatches alternate so that one computes while the other's exchange is
in flight (`place_slot`). Gaps that remain are filled with weight gradients, and with the recomputation that
the rank's next backward will need. Deterministic, and equal on all ranks of an expert group, because it
decides per pipeline rank from the same costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import END_OF_STEP, ops_of
from mhc_dist.pipeline.merge_slots import Group, merge_slots
from mhc_dist.pipeline.place_rank import RankPlacer
from mhc_dist.pipeline.placement import CAUTION, Placement
from mhc_dist.pipeline.receives import COMPUTE_KINDS, post_receives
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.simulate import Simulation

TICKS_PER_SECOND = 1_000_000_000

TIE = 0.005
"""Programs this close in time are alike, costs being no better known: the one that waits least for exchanges
depends on them least."""


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
    placer = RankPlacer(chunks, layout, costs, placement)
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
    placer: RankPlacer,
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
