"""`mhc-dist bench simulator`: predicted against measured steps, for every schedule and recompute mode.

For each case, steps of the plain lowering on the same ranks and link calibrate the simulator: seconds of
phases (--ranks 4 and 8, in delay mode: measured in one process alone), how far phases differ from them, what
starting and ending exchanges takes. Exchanges and messages are those of the emulated link. Two such steps
place the phases. Then plain and placed steps take turns, and cases too: from the plain ones the simulator
predicts the placed ones. So it is told how fast the processors were at the time, and nothing of placed steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from mhc_dist.bench.calibrated import calibrated, calibrated_by, on_loopback
from mhc_dist.bench.cell import Cell, Mode, Runner, message_bytes, run_ranks, with_recompute
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.costs import link_for, machine_of, on_link
from mhc_dist.bench.overlap import add_rank_options, label_of, rank_settings, slow_motion_of
from mhc_dist.bench.overrun import Overrun
from mhc_dist.bench.routing import Rule
from mhc_dist.bench.simulated import predicted_seconds
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.trace import Event
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
MODES: tuple[Mode, ...] = ("none", "mhc", "full")


@dataclass(frozen=True)
class Plan:
    """ratio: all-to-all over compute. slow_motion: nominal over measured time, None computes in real time."""

    schedules: tuple[str, ...]
    modes: tuple[Mode, ...]
    ratio: float
    rounds: int
    slow_motion: float | None
    routing: Rule


@dataclass
class _Case:
    """One schedule in one mode, and its steps so far on this rank."""

    plain: Runner
    placed: Runner
    costs: CostTable
    """As placement knew them."""
    plain_steps: list[list[Event]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of placed steps."""
    overrun: Overrun = field(default_factory=Overrun)


def measure(rank: int, store: str, config: RunConfig, plan: Plan, result: Path) -> None:
    """One rank of the bench. Rank 0 writes its figures to `result`."""
    configs = {
        (name, mode): _with_schedule(with_recompute(config, mode), name)
        for name, mode in product(plan.schedules, plan.modes)
    }
    plain = {case: lower(schedule_of(c), own_shapes(c).chunks) for case, c in configs.items()}
    cell = Cell.join(
        rank, store, config, sorted({link for p in plain.values() for link in p.links}), plan.routing
    )
    cases = {case: _prepare(cell, configs[case], plain[case], plan) for case in configs}
    for turn in range(plan.rounds + 1):
        for case in cases.values():
            plain_trace = case.plain.step()[1]
            seconds, trace = case.placed.step()
            if turn:  # the first turn warms up
                case.plain_steps.append(plain_trace.events)
                case.seconds.append(seconds)
                if plan.slow_motion is not None:
                    case.overrun += Overrun.of(trace.events, case.costs)
    predicted = {key: _predicted(cell, case) for key, case in cases.items()}
    overruns = cell.gather({case: found.overrun for case, found in cases.items()})
    if rank == 0:
        result.write_text(json.dumps(_figures(cases, predicted, overruns, config, plan)))
    cell.leave()


def _with_schedule(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"name": name})})


def _prepare(cell: Cell, config: RunConfig, plain: Program, plan: Plan) -> _Case:
    """Measure, choose the link, place. Collective."""
    stage = cell.stage(config, plain)
    compute, payloads = on_loopback(cell, config, stage, plain, plan.slow_motion)
    link = link_for(compute, payloads, plain, plan.ratio)
    costs = on_link(compute, payloads, link, message_bytes(config))
    nominal = None if plan.slow_motion is None else costs
    plain_runner = cell.runner(stage, plain, nominal, link)
    costs = calibrated(cell, costs, plain_runner)
    program = placed_program(config, machine_of(config), costs=costs)
    return _Case(plain_runner, cell.runner(stage, program, nominal, link), costs)


def _predicted(cell: Cell, case: _Case) -> float:
    """Seconds of the placed step, by the plain steps of the timed rounds. Collective."""
    costs = calibrated_by(cell, case.costs, case.plain_steps, in_delay_mode=case.plain.in_delay_mode)
    return predicted_seconds(case.placed.program, costs)


def _figures(
    cases: dict[tuple[str, Mode], _Case],
    predicted: dict[tuple[str, Mode], float],
    overruns: Sequence[dict[tuple[str, Mode], Overrun]],
    config: RunConfig,
    plan: Plan,
) -> dict[str, Any]:
    rows = []
    for (name, mode), case in cases.items():
        measured = median(case.seconds)
        row: dict[str, Any] = {
            "schedule": name,
            "recompute": mode,
            "predicted_seconds": predicted[name, mode],
            "measured_seconds": measured,
            "ratio": predicted[name, mode] / measured,
        }
        if plan.slow_motion is not None:
            row |= sum((of_rank[name, mode] for of_rank in overruns), Overrun()).figures()
        rows.append(row)
    total = sum((overrun for of_rank in overruns for overrun in of_rank.values()), Overrun())
    return {
        "worst_error_ratio": max(abs(row["ratio"] - 1.0) for row in rows),
        "cases": rows,
        "all_to_all_to_compute_ratio": plan.ratio,
        "slow_motion": plan.slow_motion,
        "routing": plan.routing,
        "ranks": config.num_processes,
        "num_microbatches": config.schedule.num_microbatches,
        "rounds": plan.rounds,
        "_overrun": asdict(total),
    }


def run(config: RunConfig, plan: Plan, max_overrun: float) -> dict[str, Any]:
    """Start the ranks and return their figures."""
    if not plan.ratio > 0 or plan.rounds < 1:
        raise ValueError(f"ratio={plan.ratio} must be above 0 and rounds={plan.rounds} at least 1.")
    figures = run_ranks(measure, config, plan)
    overrun = Overrun(**figures.pop("_overrun"))
    overrun.check(max_overrun)
    return figures | (overrun.figures() if plan.slow_motion is not None else {})


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_rank_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every case (3)")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE")


def _settings(options: argparse.Namespace) -> Sequence[str]:
    return (*rank_settings(options), "schedule.num_microbatches=8")


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'':13}{'recompute':11}{'predicted':>11}{'measured':>11}{'ratio':>7}{'overrun':>9}"]
    for row in figures["cases"]:
        overrun = f"{row['overrun_share']:.1%}" if "overrun_share" in row else ""
        lines.append(
            f"{row['schedule']:13}{row['recompute']:11}{row['predicted_seconds']:9.3f} s"
            f"{row['measured_seconds']:9.3f} s{row['ratio']:7.2f}{overrun:>9}"
        )
    return "\n".join(lines)


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    plan = Plan(
        tuple(options.schedules),
        tuple(options.modes),
        options.ratio,
        options.rounds,
        slow_motion_of(options),
        options.routing,
    )
    figures = run(config, plan, options.max_overrun)
    return Outcome(f"simulator_{options.ranks}_ranks", label_of(options), figures, _table(figures))


BENCH = Bench("simulator", __doc__, _add_options, _measure, _settings)

if __name__ == "__main__":
    BENCH.main()
