"""What one layout costs: place, simulate, summarise. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_dist.config import RunConfig
from mhc_dist.model.flops import model_flops_per_token
from mhc_dist.pipeline.action import Action, ActionKind, Pass, Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.place import place_and_simulate
from mhc_dist.pipeline.placement import Placement
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.summary import Summary
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.collector import collector_paused
from mhc_dist.plan.costs import CostModel
from mhc_dist.plan.layout import Layout, cached_schedule, model_ranks, planned_shapes, sized
from mhc_dist.plan.long_steps import short_count, stretched
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.static_memory import StaticBytes, static_by_rank


@dataclass(frozen=True)
class Evaluation:
    """A layout and what it costs. Memory is the fullest rank's peak."""

    layout: Layout
    summary: Summary
    tokens_per_second: float
    model_flops_utilization: float
    reduce_seconds: float
    fullest: StaticBytes
    """Static memory of the rank with the highest peak."""

    @property
    def step_seconds(self) -> float:
        return self.summary.step_seconds

    @property
    def peak_bytes(self) -> int:
        return max(self.summary.peak_bytes)


@dataclass(frozen=True)
class Planned:
    """Everything that leads to an evaluation, for pictures and further questions."""

    schedule: CoarseSchedule
    costs: CostTable
    program: Program
    simulation: Simulation
    static: list[StaticBytes]


def build(
    config: RunConfig,
    machine: Machine,
    layout: Layout,
    charge: Charge | None = None,
    *,
    overlap: bool = True,
) -> Planned:
    """Place and simulate one step of `layout`; without `overlap`, passes run one after the other."""
    schedule = cached_schedule(layout.schedule, layout.pipeline, layout.num_microbatches)
    config = sized(config, layout)
    shapes = planned_shapes(config, model_ranks(schedule), layout)
    costs = CostModel(config, machine).table(layout, shapes, schedule.chunk_rank, charge)
    if overlap:
        placement = Placement(memory_budget=machine.memory_budget)
        program, simulation = place_and_simulate(schedule, shapes.chunks, costs, placement)
    else:
        program = in_turn(lower(schedule, shapes.chunks))
        simulation = Simulation(program, costs)
    static = static_by_rank(config, layout, shapes, schedule.chunk_rank)
    return Planned(schedule, costs, program, simulation, static)


def in_turn(program: Program) -> Program:
    """Every exchange is awaited where it is issued: nothing is hidden."""
    ranks = []
    for actions in program.actions:
        waits = {_exchange(a): a for a in actions if a.kind is ActionKind.WAIT}
        ranks.append(
            tuple(
                action
                for a in actions
                if a.kind is not ActionKind.WAIT
                for action in ((a, waits[_exchange(a)]) if a.kind is ActionKind.ISSUE else (a,))
            )
        )
    return replace(program, actions=tuple(ranks))


def _exchange(action: Action) -> tuple[int, int, str, Pass | None]:
    return (action.chunk, action.microbatch, action.item, action.direction)


def evaluate(
    config: RunConfig,
    machine: Machine,
    layout: Layout,
    charge: Charge | None = None,
    *,
    overlap: bool = True,
) -> Evaluation:
    """Figures of one step of `layout`; of very many microbatches, only as many are simulated as it takes."""
    num_simulated = short_count(layout.schedule, layout.pipeline, layout.num_microbatches)
    simulated = replace(layout, num_microbatches=num_simulated)
    with collector_paused():
        planned = build(config, machine, simulated, charge, overlap=overlap)
    config = sized(config, layout)
    summary = stretched(planned.simulation, layout.pipeline, num_simulated, layout.num_microbatches)
    tokens = (
        layout.data
        * layout.num_microbatches
        * config.data.sequences_per_microbatch
        * config.data.sequence_length
    )
    peak = machine.cluster.matmul_rate(config.train.precision) * layout.num_devices
    return Evaluation(
        layout=layout,
        summary=summary,
        tokens_per_second=tokens / summary.step_seconds,
        model_flops_utilization=tokens * model_flops_per_token(config) / summary.step_seconds / peak,
        reduce_seconds=planned.costs.reduce_seconds,
        fullest=planned.static[summary.peak_bytes.index(max(summary.peak_bytes))],
    )
