"""`mhc-dist bench memory`: bytes kept between forward and backward, and the peak of a step, counted.

Saved bytes: one process, one microbatch through all chunks, counted by the allocator right before the first
backward action, per recompute mode and against the paper's formula.

Peaks: two pipeline ranks with experts over two, whole steps of several schedules in every mode. After each
action every rank counts what it holds beyond weights and their gradients; the largest count is compared with
the largest that the simulator holds after an action. What an action allocates and gives back within itself
is in neither.

Bytes are counted, so the load of the machine does not matter.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.cell import Cell, Mode, message_bytes, run_ranks, with_recompute
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.costs import machine_of
from mhc_dist.bench.heap import heap_bytes
from mhc_dist.config import RunConfig
from mhc_dist.parallel.recompute import best_block, phase_blocks
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.cost import CostTable, MessageCost
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.memory import settled_bytes
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program, run_costs
from mhc_dist.plan.run_programs import RunPrograms, plan_run

MODES: tuple[Mode, ...] = ("none", "mhc", "full")
SCHEDULES = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
PEAK_SETTINGS = {"pipeline": 2, "data": 2, "expert": 2}
FORWARD_KINDS = (ActionKind.COMPUTE, ActionKind.ISSUE, ActionKind.WAIT, ActionKind.HAND_OVER)


def alone(config: RunConfig, mode: Mode) -> RunConfig:
    """The run's model on one process, one microbatch, forward of all chunks before any backward."""
    parallel = config.parallel.model_copy(update={"pipeline": 1, "data": 1, "expert": 1})
    schedule = config.schedule.model_copy(update={"name": "gpipe", "num_microbatches": 1, "cluster": None})
    return with_recompute(
        config.model_copy(update={"parallel": parallel, "schedule": schedule, "deepspeed": {}}), mode
    )


def kept_bytes(config: RunConfig, mode: Mode) -> int:
    """Heap bytes that the forward leaves behind for the backward."""
    config = alone(config, mode)
    programs = plan_run(config)
    stage = whole_stage(config, programs)
    before = 0
    held: list[int] = []

    def look(action: Action) -> None:
        if action.kind not in FORWARD_KINDS and not held:
            gc.collect()
            held.append(heap_bytes() - before)

    nobody = Nobody()
    microbatches = random_microbatches(config)
    executor = Executor(0, stage.by_index, nobody, look)
    for _ in range(2):  # the first run pays for what is allocated once: imports, rotary tables, gradients
        held.clear()
        gc.collect()
        before = heap_bytes()
        executor.run(programs.training, microbatches, nobody)
    return held[0]


def droppable_bytes(config: RunConfig, programs: RunPrograms) -> tuple[int, int]:
    """What the formula says of streams and sublayer inputs: (kept by mode none, kept by mode mhc).

    Every sublayer makes n + 1 rows a token: its streams and its input. Recomputing keeps the n rows at the
    start of each block (mHC paper, 4.3.2; y_l and the coefficients stay in both modes).
    """
    n = config.residual.num_streams
    value_bytes = 4 if config.train.precision == "fp32" else 2
    tokens = config.data.sequences_per_microbatch * config.data.sequence_length
    row_bytes = tokens * config.model.hidden_size * value_bytes
    everything = kept = 0
    for place, shape in zip(programs.places, programs.training.chunks, strict=True):
        num_sublayers = 2 * (place.last_layer - place.first_layer)
        block = config.recompute.block
        length = best_block(num_sublayers, n) if block == "auto" else block
        everything += num_sublayers * (n + 1) * row_bytes
        kept += len(phase_blocks(shape, length)) * n * row_bytes
    return everything, kept


def saved_figures(config: RunConfig) -> dict[str, Any]:
    """What recomputation removes, against the formula."""
    kept = {mode: kept_bytes(config, mode) for mode in MODES}
    everything, starts = droppable_bytes(config, plan_run(alone(config, "mhc")))
    saved = kept["none"] - kept["mhc"]
    return {
        "saved_bytes_ratio": saved / (everything - starts),
        "kept_bytes": kept,
        "saved_bytes": saved,
        "formula_saved_bytes": everything - starts,
        "formula_kept_bytes": {"none": everything, "mhc": starts},
    }


# Peaks


@dataclass(frozen=True)
class Peak:
    """Largest number of bytes held after an action, counted and simulated."""

    counted: int
    simulated: int

    @property
    def ratio(self) -> float:
        return self.simulated / self.counted


def peaks(rank: int, store: str, config: RunConfig, cases: Sequence[tuple[str, Mode]], result: Path) -> None:
    """One rank: a step of every case. Rank 0 writes all ranks' peaks to `result`."""
    configs = {case: _case_config(config, *case) for case in cases}
    links = {link for c in configs.values() for link in lower(schedule_of(c), own_shapes(c).chunks).links}
    cell = Cell.join(rank, store, config, sorted(links))
    found = {case: cell.gather(_peak(cell, own)) for case, own in configs.items()}
    if rank == 0:
        worst = {case: max(ranks, key=lambda peak: abs(peak.ratio - 1.0)) for case, ranks in found.items()}
        result.write_text(json.dumps(_peak_figures(worst)))
    cell.leave()


def _case_config(config: RunConfig, name: str, mode: Mode) -> RunConfig:
    schedule = config.schedule.model_copy(update={"name": name})
    return with_recompute(config.model_copy(update={"schedule": schedule}), mode)


def _peak(cell: Cell, config: RunConfig) -> Peak:
    costs = _bytes_of_activations(config)
    program = placed_program(config, machine_of(config), costs=costs)
    stage = cell.stage(config, program)
    counts: list[int] = []
    runner = cell.runner(stage, program, on_action=lambda action: counts.append(heap_bytes()))
    runner.step()  # pays for what is allocated once
    counts.clear()
    gc.collect()
    before = heap_bytes()
    gc.disable()
    runner.step(keep_gradients=True)
    gc.enable()
    held = settled_bytes(program, costs, cell.topology.pipeline_rank)
    return Peak(max(counts) - before, max(held_bytes for _, held_bytes in held))


def _bytes_of_activations(config: RunConfig) -> CostTable:
    """The planner's costs without what a rank holds all the time."""
    costs = run_costs(config, machine_of(config))
    message = MessageCost(costs.message.seconds, message_bytes(config), costs.message.lane)
    return replace(costs, static_bytes=(), message=message)


def _peak_figures(worst: dict[tuple[str, Mode], Peak]) -> dict[str, Any]:
    return {
        "peak_error_ratio": max(abs(peak.ratio - 1.0) for peak in worst.values()),
        "peaks": [
            {
                "schedule": name,
                "recompute": mode,
                "counted_bytes": peak.counted,
                "simulated_bytes": peak.simulated,
                "ratio": peak.ratio,
            }
            for (name, mode), peak in worst.items()
        ],
    }


def peak_figures(config: RunConfig, schedules: Sequence[str], modes: Sequence[Mode]) -> dict[str, Any]:
    """Peaks on four ranks; of every case the rank that is furthest off."""
    parallel = config.parallel.model_copy(update=PEAK_SETTINGS)
    cases = tuple(product(schedules, modes))
    return run_ranks(peaks, config.model_copy(update={"parallel": parallel}), cases)


def run(config: RunConfig, schedules: Sequence[str] = SCHEDULES) -> dict[str, Any]:
    """All figures."""
    return saved_figures(config) | peak_figures(config, schedules, MODES)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, metavar="NAME")


def _table(figures: dict[str, Any]) -> str:
    lines = [
        f"recomputation removes {figures['saved_bytes_ratio']:.2%} of what the formula says",
        f"{'peak of a step':13}{'recompute':>11}{'counted':>13}{'simulated':>13}{'ratio':>7}",
    ]
    for row in figures["peaks"]:
        counted, simulated = row["counted_bytes"] / 2**20, row["simulated_bytes"] / 2**20
        lines.append(
            f"{row['schedule']:14}{row['recompute']:>11}{counted:9.1f} MiB{simulated:9.1f} MiB"
            f"{row['ratio']:7.3f}"
        )
    return "\n".join(lines)


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    figures = run(config, options.schedules)
    label = "measured: bytes counted by the allocator, CPU; peaks on four ranks against the simulator"
    return Outcome("memory", label, figures, _table(figures))


BENCH = Bench("memory", __doc__, _add_options, _measure)

if __name__ == "__main__":
    BENCH.main()
