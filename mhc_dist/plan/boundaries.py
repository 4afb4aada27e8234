"""Searches where to cut the model: balances, then shifts, each judged by a simulated step. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mhc_dist.config import RunConfig
from mhc_dist.parallel.partition import partition, split_layers
from mhc_dist.pipeline.balance import balance_ranks
from mhc_dist.plan.costs import CostModel
from mhc_dist.plan.evaluate import Evaluation, evaluate
from mhc_dist.plan.layout import Layout, cached_schedule, model_ranks, planned_shapes, sized
from mhc_dist.plan.machine import Machine


def best_balance(config: RunConfig, machine: Machine, evaluation: Evaluation) -> Evaluation:
    """The run's own boundaries or a balance by time: the fastest that fits, written into the layout.

    evaluation: of a layout that leaves boundaries to the run.
    """
    assert evaluation.layout.boundaries is None
    own = tuple(partition(config, ranks_of(evaluation.layout)))
    best = replace(evaluation, layout=replace(evaluation.layout, boundaries=own))
    for boundaries in dict.fromkeys(balances(config, machine, best.layout)):
        if boundaries != own:
            best = _better(config, machine, best, boundaries)
    return best


def best_shifts(config: RunConfig, machine: Machine, best: Evaluation, num_tries: int) -> Evaluation:
    """Moves one boundary after the other by one layer, as long as that helps, in at most `num_tries`
    simulated steps. Deterministic.
    """
    assert best.layout.boundaries is not None
    tried = {best.layout.boundaries}
    while True:
        before = best
        assert before.layout.boundaries is not None
        for boundaries in shifts(before.layout.boundaries):
            if boundaries in tried:
                continue
            if len(tried) > num_tries:
                return best
            tried.add(boundaries)
            best = _better(config, machine, best, boundaries)
            if best is not before:
                break
        else:
            return best


def _better(config: RunConfig, machine: Machine, best: Evaluation, boundaries: tuple[int, ...]) -> Evaluation:
    """`best`, or the same layout cut at `boundaries` if that is faster and fits."""
    found = evaluate(config, machine, replace(best.layout, boundaries=boundaries))
    fits = found.peak_bytes <= machine.memory_budget
    return found if fits and found.step_seconds < best.step_seconds else best


def ranks_of(layout: Layout) -> tuple[int, ...]:
    return model_ranks(cached_schedule(layout.schedule, layout.pipeline, layout.num_microbatches))


def balances(config: RunConfig, machine: Machine, layout: Layout) -> Iterator[tuple[int, ...]]:
    """Cuts that balance seconds instead of operations: by chunk, then by rank."""
    chunk_rank = ranks_of(layout)
    layers, head = layer_seconds(config, machine, layout)
    by_chunk = split_layers(layers, len(chunk_rank), last_extra=head)
    yield tuple(by_chunk)
    yield tuple(balance_ranks(layers, chunk_rank, by_chunk, last_extra=head))


def layer_seconds(config: RunConfig, machine: Machine, layout: Layout) -> tuple[list[float], float]:
    """Compute seconds of each layer, forward and backward, and of the output head."""
    config = sized(config, layout)
    num_layers = config.model.num_layers
    alone = replace(layout, pipeline=num_layers, boundaries=tuple(range(num_layers + 1)))
    ranks = tuple(range(num_layers))
    costs = CostModel(config, machine).table(alone, planned_shapes(config, ranks, alone), ranks)
    seconds = [0.0] * num_layers
    for (chunk, _), phase in costs.phases.items():
        seconds[chunk] += phase.forward + phase.input_gradient + phase.weight_gradient + phase.recompute
    # The layers at the end are alike, but the last one also has the head.
    head = seconds[-1] - seconds[-2] if num_layers > 1 else 0.0
    return [*seconds[:-1], seconds[-1] - head], head


def shifts(boundaries: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """One boundary moved by one layer; every chunk keeps a layer."""
    for position in range(1, len(boundaries) - 1):
        for step in (-1, 1):
            moved = boundaries[position] + step
            if boundaries[position - 1] < moved < boundaries[position + 1]:
                yield (*boundaries[:position], moved, *boundaries[position + 1 :])
