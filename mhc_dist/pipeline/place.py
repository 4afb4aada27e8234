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
from mhc_dist.pipeline.run_times import RunTimes
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.simulate import Simulation

Placed = tuple[Program, Simulation]
"""A program and its run."""

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
) -> Placed:
    """For runs, which then never get a slower program than the planner found for them; the planner itself
    saves the time: counts awaited late or at once, slots that look ahead or not.

    What is safe, late counts, costs nothing where no rank waits for exchanges all the same: no other attempt.
    Costs that know how phases differ tell which program really is the fastest; without them the one that
    waits late may take CAUTION longer.
    """
    placement = placement or Placement()
    late, at_once = (replace(placement, late_counts=late) for late in (True, False))
    safest = place_and_simulate(schedule, chunks, costs, late)
    waiting = max(rank.blocked(ActionKind.WAIT) for rank in safest[1].ranks)
    if costs.jitter is None and waiting <= CAUTION * safest[1].makespan and _fits(safest[1], placement):
        return safest
    # A choice among more orders, slot by slot, mostly ends in a faster step, but not always.
    safe, plain = (
        [found, *candidates(schedule, chunks, costs, replace(of, thorough=True))]
        for of, found in (
            (late, safest),
            (at_once, place_and_simulate(schedule, chunks, costs, at_once)),
        )
    )
    if costs.jitter is not None:
        real = [(program, Simulation(program, costs)) for program, _ in (*safe, *plain)]
        chosen, _ = _best(real, placement)
        return next(run for run in (*safe, *plain) if run[0] is chosen)
    runs = [_best(safe, placement), _best(plain, placement)]
    runs = [run for run in runs if _fits(run[1], placement)] or runs
    fastest = min(simulation.makespan for _, simulation in runs)
    return next(run for run in runs if run[1].makespan <= (1 + CAUTION) * fastest)


def place_and_simulate(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placement: Placement | None = None,
) -> Placed:
    """As `place`, with the run of the result, which was needed to choose it.

    That run is of phases that all last their cost: what ran side by side in it may run side by side.
    """
    placement = placement or Placement()
    return _best(candidates(schedule, chunks, costs, placement), placement)


def candidates(
    schedule: CoarseSchedule, chunks: tuple[ChunkShape, ...], costs: CostTable, placement: Placement
) -> list[Placed]:
    """Programs to choose from, with their runs; the last half looks ahead, if `placement` does."""
    if len(chunks) != len(schedule.chunk_rank):
        raise ValueError(f"{len(chunks)} chunks given, but the schedule lays out {len(schedule.chunk_rank)}.")
    costs = replace(costs, jitter=None)
    layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
    placer = RankPlacer(chunks, layout, costs, placement)
    groups = [[Group(ops_of(slot)) for slot in slots] for slots in schedule.ranks]

    def run(own: Sequence[Sequence[Group]], times: RunTimes | None = None) -> Placed:
        program = assemble(schedule, chunks, costs, placer, own, times)
        return program, Simulation(program, costs)

    program, simulation = run(groups)
    runs = [(program, simulation)]
    if not placement.merge_slots or not placer.has_exchanges:
        return runs
    grouped = [groups]
    for ordered in (False, True):
        joined = merge_slots(groups, program, simulation, ordered=ordered)
        if joined != groups:
            runs.append(run(joined))
            grouped.append(joined)
    if placement.thorough:
        runs += [run(own, RunTimes(*known)) for own, known in zip(grouped, list(runs), strict=True)]
    return runs


def _fits(simulation: Simulation, placement: Placement) -> bool:
    budget = placement.memory_budget
    return budget is None or max(rank.peak_bytes for rank in simulation.ranks) <= budget


def _best(runs: Sequence[Placed], placement: Placement) -> Placed:
    """Of those within memory (of all, if none is) the fastest; of equals (TIE) the one that waits least."""
    fitting = [run for run in runs if _fits(run[1], placement)] or runs
    fastest = min(simulation.makespan for _, simulation in fitting)
    alike = [run for run in fitting if run[1].makespan <= (1 + TIE) * fastest]
    return min(alike, key=lambda run: sum(rank.blocked(ActionKind.WAIT) for rank in run[1].ranks))


def assemble(
    schedule: CoarseSchedule,
    chunks: tuple[ChunkShape, ...],
    costs: CostTable,
    placer: RankPlacer,
    groups: Sequence[Sequence[Group]],
    times: RunTimes | None = None,
) -> Program:
    """The program of `groups`, in the order that `placer` finds. times: for slots that look ahead."""

    def duration(action: Action) -> int:
        return max(1, ticks(costs.seconds(action))) if action.kind in COMPUTE_KINDS else 0

    ranks = [_finish_rank(placer.place_rank(rank, own, times)) for rank, own in enumerate(groups)]
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
