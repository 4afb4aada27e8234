"""Finds the best layouts of a run on a cluster: enumerate, estimate, simulate the promising. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from mhc_dist.config import RunConfig
from mhc_dist.parallel.recompute import best_block
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.registry import SCHEDULES, SIMULATED_ONLY
from mhc_dist.pipeline.unit_costs import peak_live
from mhc_dist.plan.boundaries import best_balance, best_shifts
from mhc_dist.plan.costs import CostModel
from mhc_dist.plan.evaluate import Evaluation, evaluate
from mhc_dist.plan.layout import (
    Layout,
    cached_schedule,
    model_ranks,
    planned_shapes,
    regenerates_streams,
    same_layout,
    sized,
)
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.parallel_map import parallel_map

NUM_SIMULATED = 10
"""Layouts that are placed and simulated; the others are ruled out by their estimate. Every schedule gets at
least one, so that none is judged by a guess alone."""

NUM_RECUT = 3
"""Of the best layouts, how many are simulated with other chunk boundaries too."""

NUM_SHIFTS = 8
"""Simulated steps that are spent on shifting boundaries of the best layout, one layer at a time."""

NUM_LEAN = 4
"""Layouts that seem to need least memory: simulated where none of the fast ones fits."""

MOST_SEQUENCES = 8
"""Largest microbatch that is tried, in sequences: beyond it pipelines only get longer bubbles."""

PLANNED_SCHEDULES = tuple(sorted(SCHEDULES.keys() - SIMULATED_ONLY))

HIDDEN_GUESS = {"dualpipev": 0.85, "zbv": 0.3, "zb1p": 0.3, "1f1b": 0.5, "gpipe": 0.3, "interleaved": 0.5}
"""Share of the all-to-all that placement hides: only for the order in which layouts are simulated."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A layout before simulation."""

    layout: Layout
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Search:
    """best: fastest first, all within memory. num_layouts: how many were possible at all."""

    best: tuple[Evaluation, ...]
    num_layouts: int
    num_fitting: int


class NothingFitsError(ValueError):
    """No layout fits: says by how much, and the nearest that would. smallest: what needs least memory of all
    that were simulated.
    """

    def __init__(self, message: str, smallest: Evaluation) -> None:
        super().__init__(message)
        self.smallest = smallest


def possible_layouts(
    config: RunConfig, num_devices: int, schedules: tuple[str, ...], *, recompute: bool = True
) -> Iterator[Layout]:
    """All layouts of `num_devices` that keep the global batch and that schedules and experts allow; without
    `recompute` only those that keep everything.
    """
    batch = config.sequences_per_step
    for pipeline in divisors(num_devices):
        data = num_devices // pipeline
        if pipeline > config.model.num_layers or batch % data:
            continue
        for sequences in microbatch_sizes(config, batch // data):
            num_microbatches = batch // (data * sequences)
            for name in schedules:
                try:
                    schedule = cached_schedule(name, pipeline, num_microbatches)
                except ValueError:
                    continue
                num_chunks = len(model_ranks(schedule))
                if num_chunks > config.model.num_layers:
                    continue
                for expert in divisors(data):
                    if config.model.num_experts % expert == 0:
                        plain = Layout(name, pipeline, expert, data, num_microbatches, sequences=sequences)
                        yield plain
                        if not recompute:
                            continue
                        yield replace(plain, recompute_everything=True)
                        for block in recompute_blocks(config, num_chunks):
                            yield replace(plain, recompute_block=block)


def microbatch_sizes(config: RunConfig, sequences: int) -> list[int]:
    """Ways to cut a data rank's share of the batch into equal microbatches."""
    most = max(MOST_SEQUENCES, config.data.sequences_per_microbatch)
    return [size for size in divisors(sequences) if size <= most]


def recompute_blocks(config: RunConfig, num_chunks: int) -> list[int]:
    """Single layers, the block that keeps least, whole chunks."""
    if not regenerates_streams(config.residual):
        return []
    sublayers = max(2, 2 * -(-config.model.num_layers // num_chunks))
    blocks = {2, best_block(sublayers, config.residual.num_streams), sublayers}
    # Phases of expert layers cross two connections, so blocks count in twos.
    return sorted({max(2, block // 2 * 2) for block in blocks})


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def search(
    config: RunConfig,
    machine: Machine,
    num_devices: int,
    schedules: tuple[str, ...] = PLANNED_SCHEDULES,
    *,
    recompute: bool = True,
) -> Search:
    """The fastest layouts that fit. ValueError if none is possible, NothingFitsError if none fits."""
    estimates = estimate_all(config, machine, num_devices, schedules, recompute=recompute)
    if not estimates:
        raise ValueError(impossible(config, num_devices))
    budget = machine.memory_budget
    # Estimates leave out placement's choices; anything near the budget is decided by simulation.
    fitting = [e for e in estimates if e.peak_bytes <= 1.1 * budget]
    groups = promising(fitting)
    simulated = parallel_map(partial(first_that_fits, config, machine), groups)
    if not any(found.peak_bytes <= budget for found in simulated):
        tried = {member.layout for group in groups for member in group}
        lean = leanest([e for e in estimates if e.layout not in tried])
        simulated += parallel_map(partial(first_that_fits, config, machine), lean)
    best = sorted((found for found in simulated if found.peak_bytes <= budget), key=merit)
    if not best:
        smallest = min(simulated, key=lambda e: (e.peak_bytes, merit(e)))
        raise NothingFitsError(nothing_fits(config, machine, num_devices, smallest, schedules), smallest)
    recut = sorted(parallel_map(partial(best_balance, config, machine), best[:NUM_RECUT]), key=merit)
    recut[0] = best_shifts(config, machine, recut[0], NUM_SHIFTS)
    return Search(tuple(sorted([*recut, *best[NUM_RECUT:]], key=merit)), len(estimates), len(fitting))


def merit(evaluation: Evaluation) -> tuple[float, str]:
    """Faster first; the name makes ties deterministic."""
    return (evaluation.step_seconds, str(evaluation.layout))


def promising(estimates: list[Estimate]) -> list[list[Estimate]]:
    """The fastest groups by estimate. A group differs only in what it recomputes, the fastest first."""
    groups: dict[Layout, list[Estimate]] = {}
    for found in sorted(estimates, key=lambda e: (e.seconds, e.peak_bytes, str(e.layout))):
        groups.setdefault(same_layout(found.layout), []).append(found)
    chosen = list(groups)[:NUM_SIMULATED]
    for name in sorted({layout.schedule for layout in groups}):
        if not any(layout.schedule == name for layout in chosen):
            chosen.append(next(layout for layout in groups if layout.schedule == name))
    return [groups[layout] for layout in chosen]


def leanest(estimates: list[Estimate]) -> list[list[Estimate]]:
    """What seems to need least memory, each by itself."""
    return [[e] for e in sorted(estimates, key=lambda e: (e.peak_bytes, e.seconds))[:NUM_LEAN]]


def first_that_fits(config: RunConfig, machine: Machine, group: list[Estimate]) -> Evaluation:
    """Recomputing more never makes a step faster, so the first member within memory is the best one. The one
    that needs least if none fits.
    """
    smallest: Evaluation | None = None
    for member in group:
        found = evaluate(config, machine, member.layout)
        if found.peak_bytes <= machine.memory_budget:
            return found
        if smallest is None or found.peak_bytes < smallest.peak_bytes:
            smallest = found
    assert smallest is not None, "a group has members"
    return smallest


def estimate_all(
    config: RunConfig,
    machine: Machine,
    num_devices: int,
    schedules: tuple[str, ...],
    *,
    recompute: bool = True,
) -> list[Estimate]:
    """Estimates of all possible layouts."""
    model = CostModel(config, machine)
    models: dict[int | None, CostModel] = {}
    known: dict[tuple[object, ...], CostTable] = {}
    estimates = []
    for layout in possible_layouts(config, num_devices, schedules, recompute=recompute):
        if layout.sequences not in models:
            models[layout.sequences] = CostModel(sized(config, layout), machine)
        model = models[layout.sequences]
        ranks = model_ranks(cached_schedule(layout.schedule, layout.pipeline, layout.num_microbatches))
        # Cutting the model and costing it is slow, and depends on little of the layout.
        key = (ranks, replace(layout, schedule="", num_microbatches=1))
        if key not in known:
            shapes = planned_shapes(config, ranks, layout)
            known[key] = model.table(layout, shapes, ranks)
        estimates.append(estimate(layout, known[key]))
    return estimates


@lru_cache(maxsize=512)
def _peaks(schedule: CoarseSchedule) -> tuple[int, ...]:
    return tuple(peak_live(slots) for slots in schedule.ranks)


def estimate(layout: Layout, costs: CostTable) -> Estimate:
    """Work of the slowest rank, plus the schedule's published idle time, plus communication not hidden."""
    schedule = cached_schedule(layout.schedule, layout.pipeline, layout.num_microbatches)
    ranks = range(layout.pipeline)
    forward, inputs, weights, wire = ([0.0 for _ in ranks] for _ in range(4))
    kept, most_dropped = [0 for _ in ranks], [0 for _ in ranks]
    for (chunk, _), phase in costs.phases.items():
        rank = schedule.chunk_rank[chunk]
        forward[rank] += phase.forward
        inputs[rank] += phase.input_gradient + phase.recompute
        weights[rank] += phase.weight_gradient
        kept[rank] += phase.saved_bytes
        most_dropped[rank] = max(most_dropped[rank], phase.dropped_bytes)
    for (chunk, _), exchange in costs.exchanges.items():
        wire[schedule.chunk_rank[chunk]] += exchange.forward + exchange.backward
    busy = max(f + i + w for f, i, w in zip(forward, inputs, weights, strict=True))
    f, b, w = max(forward), max(inputs) + max(weights), max(weights)
    distance = layout.pipeline - 1
    idle = {
        "zb1p": distance * (f + b - 2 * w),
        "zbv": distance * max(0.0, f + b - 3 * w) / 2 + distance * f / 8,
        "dualpipev": distance * (f + 2 * b - 3 * w) / 2,
        "interleaved": distance * (f + b) / 2,
    }.get(layout.schedule, distance * (f + b))
    exposed = (1 - HIDDEN_GUESS[layout.schedule]) * max(wire)
    seconds = layout.num_microbatches * (busy + exposed) + idle + costs.reduce_seconds
    share = len(schedule.chunk_rank) / layout.pipeline
    peaks = [
        static + round(live / share * held) + dropped
        for static, live, held, dropped in zip(
            costs.static_bytes, _peaks(schedule), kept, most_dropped, strict=True
        )
    ]
    return Estimate(layout, seconds, max(peaks))


def fastest(estimates: list[Estimate]) -> Estimate:
    return min(estimates, key=lambda e: (e.seconds, e.peak_bytes))


def impossible(config: RunConfig, num_devices: int) -> str:
    """Why no layout of `num_devices` keeps the batch."""
    batch = config.sequences_per_step
    pipelines = [d for d in divisors(num_devices) if d <= config.model.num_layers]
    tried = ", ".join(f"{num_devices // d} data x {d} pipeline" for d in pipelines)
    workable = [n for n in range(1, 2 * num_devices + 1) if batch % n == 0]
    nearest = min(workable, key=lambda n: (abs(n - num_devices), n))
    return (
        f"{num_devices} devices cannot share a batch of {batch} sequences equally"
        f" with {config.model.num_layers} layers (tried {tried}). Use --gpus {nearest}, or change"
        " schedule.num_microbatches or parallel.data."
    )


def nothing_fits(
    config: RunConfig,
    machine: Machine,
    num_devices: int,
    smallest: Evaluation,
    schedules: tuple[str, ...],
) -> str:
    """By how much the smallest layout misses, and the smallest number of devices whose layouts fit."""
    budget = machine.memory_budget
    text = (
        f"no layout of {num_devices} devices fits: the smallest, {smallest.layout}, needs"
        f" {smallest.peak_bytes / 1e9:.1f} GB of the {budget / 1e9:.1f} GB usable on one"
        f" {machine.cluster.device.name}, {(smallest.peak_bytes - budget) / 1e9:.1f} GB too much."
    )
    for factor in range(2, 65):
        larger = estimate_all(config, machine, num_devices * factor, schedules)
        fitting = [e for e in larger if e.peak_bytes <= budget]
        if not fitting:
            continue
        # Estimates hold less than simulated steps: the fastest layout by estimate may not fit after all.
        nearest = first_that_fits(config, machine, [fastest(fitting), *(e for [e] in leanest(fitting))])
        if nearest.peak_bytes <= budget:
            return f"{text} The nearest that does fit: --gpus {num_devices * factor}, {nearest.layout}."
    return f"{text} No multiple of them up to {64 * num_devices} fits either: lower data.sequence_length."
