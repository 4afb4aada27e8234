"""`mhc-dist bench simulator`: predicted against measured steps, for every schedule and recompute mode.

In each case steps of the plain lowering and of the placed program take turns, on the same ranks and link.
From the plain steps before and after it the simulator predicts each placed one: from seconds of phases
(--ranks 4 and 8, in delay mode: measured in one process alone), from how far phases of each rank differed
from them, from what starting and ending exchanges takes. Exchanges and messages are those of the emulated
link. So it is told how fast the processors were at the time, and nothing of placed steps. The first plain
step is also what placement goes by. All compute the same gradients, bit for bit.

Cases are measured one after the other and kept as they are done, in NAME.unfinished.jsonl beside the result:
after an end before the last one, --resume goes on. --minutes ends it in time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from torch import Tensor

from mhc_dist.bench.calibrated import calibrated_by, on_loopback
from mhc_dist.bench.cell import Cell, Mode, Runner, message_bytes, run_ranks, with_recompute
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.costs import Payloads, link_for, machine_of, on_link
from mhc_dist.bench.equality import Equality, all_of, compared
from mhc_dist.bench.overrun import Overrun
from mhc_dist.bench.ranks import add_rank_options, label_of, rank_settings, slow_motion_of
from mhc_dist.bench.result import conditions
from mhc_dist.bench.routing import Rule
from mhc_dist.bench.simulated import compared_steps
from mhc_dist.bench.unfinished import Row, Unfinished
from mhc_dist.config import RunConfig
from mhc_dist.parallel.layout import ChunkPlace
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.trace import Trace
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program, run_costs

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
MODES: tuple[Mode, ...] = ("none", "mhc", "full")

CaseName = tuple[str, Mode]
"""(schedule, recompute mode)"""

SAME = ("commit", "processor", "cores", "python", "torch")
"""Conditions that cases of one result have in common."""


@dataclass(frozen=True)
class Plan:
    """ratio: all-to-all over compute. slow_motion: nominal over measured time, None computes in real time.

    seconds: no case begins later than this; None for no limit.
    """

    cases: tuple[CaseName, ...]
    ratio: float
    rounds: int
    slow_motion: float | None
    max_overrun: float
    routing: Rule
    seconds: float | None = None


def measure(
    rank: int, store: str, config: RunConfig, plan: Plan, unfinished: Unfinished, result: Path
) -> None:
    """One rank of the bench. Rank 0 keeps the rows of cases in `unfinished`; in `result` it leaves those that
    are not valid.
    """
    configs = {case: _config_of(config, *case) for case in plan.cases}
    plain = {case: lower(schedule_of(c), own_shapes(c).chunks) for case, c in configs.items()}
    links = sorted({link for p in plain.values() for link in p.links})
    cell = Cell.join(rank, store, config, links, plan.routing)
    compute = _Compute(cell, plan)
    late: list[Row] = []
    began = monotonic()
    for case in plan.cases:
        if cell.from_rank_0(plan.seconds is not None and monotonic() - began > plan.seconds):
            break
        row = _row(cell, case, _prepare(cell, configs[case], plain[case], plan, compute), plan)
        if rank == 0:
            if row.get("overrun_share", 0.0) <= plan.max_overrun:
                unfinished.add(row)
            else:
                late.append(row)
    if rank == 0:
        result.write_text(json.dumps({"late": late}))
    cell.leave()


def _config_of(config: RunConfig, name: str, mode: Mode) -> RunConfig:
    schedule = config.schedule.model_copy(update={"name": name})
    return with_recompute(config.model_copy(update={"schedule": schedule}), mode)


class _Compute:
    """What compute and exchanges of a case cost before any link slows them down, measured once for all cases
    that cut the model into the same chunks.
    """

    def __init__(self, cell: Cell, plan: Plan) -> None:
        self._cell, self._slow_motion = cell, plan.slow_motion
        self._modes = tuple(dict.fromkeys(mode for _, mode in plan.cases))
        self._known: dict[tuple[ChunkPlace, ...], tuple[dict[Mode, CostTable], Payloads]] = {}

    def of(self, config: RunConfig) -> tuple[CostTable, Payloads]:
        """Collective."""
        cut = own_shapes(config).places
        if cut not in self._known:
            self._known[cut] = self._measured(config)
        costs, payloads = self._known[cut]
        # All but the seconds of phases depends on the schedule, too.
        own = run_costs(config, machine_of(config))
        return replace(own, phases=costs[config.recompute.mode].phases), payloads

    def _measured(self, config: RunConfig) -> tuple[dict[Mode, CostTable], Payloads]:
        configs = {mode: with_recompute(config, mode) for mode in self._modes}
        runners = {}
        for mode, own in configs.items():
            plain = lower(schedule_of(own), own_shapes(own).chunks)
            runners[mode] = self._cell.runner(self._cell.stage(own, plain), plain)
        return on_loopback(self._cell, configs, runners, self._slow_motion)


@dataclass(frozen=True)
class _Case:
    """One schedule in one mode, on this rank. costs: as placement knew them."""

    plain: Runner
    placed: Runner
    costs: CostTable
    first: Trace
    """The plain step that placement knew them by."""
    gradients: dict[str, Tensor]
    """Of that step."""


def _prepare(cell: Cell, config: RunConfig, plain: Program, plan: Plan, compute: _Compute) -> _Case:
    """Choose the link, calibrate, place. Collective."""
    stage = cell.stage(config, plain)
    on_host, payloads = compute.of(config)
    link = link_for(on_host, payloads, plain, plan.ratio, cell.route.waiting)
    costs = on_link(on_host, payloads, link, message_bytes(config))
    nominal = None if plan.slow_motion is None else costs
    cell.runner(stage, plain).step()  # pays for what is allocated once, as fast as it can
    runner = cell.runner(stage, plain, nominal, link)
    first = runner.step()[1]
    gradients = {key: gradient.clone() for key, gradient in runner.gradients().items()}
    costs = calibrated_by(cell, costs, [first.events], in_delay_mode=runner.in_delay_mode)
    program = cell.made_by_rank_0(lambda: placed_program(config, machine_of(config), costs=costs))
    cell.runner(stage, program).step()
    return _Case(runner, cell.runner(stage, program, nominal, link), costs, first, gradients)


def _row(cell: Cell, name: CaseName, case: _Case, plan: Plan) -> Row:
    """Plain and placed steps in turn, and what the plain ones say of the placed one between. Collective."""
    plain_steps, placed_steps = [case.first.events], []
    measured: list[float] = []
    equality = Equality()
    for _ in range(plan.rounds):
        step_seconds, trace = case.placed.step()
        equality += compared(case.gradients, case.placed.gradients(), "placed")
        measured.append(step_seconds)
        placed_steps.append(trace.events)
        plain_steps.append(case.plain.step()[1].events)
    equality = all_of(cell.gather(equality))
    equality.check()
    overrun = Overrun()
    if plan.slow_motion is not None:
        # Of both: late plain steps make a late prediction.
        own = sum((Overrun.of(step, case.costs) for step in (*plain_steps, *placed_steps)), Overrun())
        overrun = sum(cell.gather(own), Overrun())
    in_delay_mode = case.plain.in_delay_mode
    known = [calibrated_by(cell, case.costs, [step], in_delay_mode=in_delay_mode) for step in plain_steps]
    said = cell.made_by_rank_0(lambda: [Simulation(case.placed.program, at).makespan for at in known])
    predicted = [fmean(around) for around in pairwise(said)]
    return {
        "schedule": name[0],
        "recompute": name[1],
        **compared_steps(predicted, measured),
        **equality.figures(),
        **(overrun.figures() if plan.slow_motion is not None else {}),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def run(config: RunConfig, plan: Plan, unfinished: Unfinished) -> list[Row]:
    """Start the ranks for the cases that `unfinished` lacks; returns the rows of all of the plan's cases.

    ValueError when some are missing: processors were late, or time was over.
    """
    rows = _by_name(unfinished)
    missing = tuple(case for case in plan.cases if case not in rows)
    late: list[Row] = []
    if missing:
        late = run_ranks(measure, config, replace(plan, cases=missing), unfinished)["late"]
        rows = _by_name(unfinished)
    left = [case for case in plan.cases if case not in rows]
    if left:
        raise ValueError(_why_left(plan, left, late, unfinished.path))
    return [rows[case] for case in plan.cases]


def _by_name(unfinished: Unfinished) -> dict[CaseName, Row]:
    return {(row["schedule"], row["recompute"]): row for row in unfinished.rows()}


def _why_left(plan: Plan, left: Sequence[CaseName], late: Sequence[Row], path: Path) -> str:
    text = f"{len(plan.cases) - len(left)} of {len(plan.cases)} cases are measured and kept in {path}."
    if late:
        cases = ", ".join(f"{r['schedule']} {r['recompute']} {r['overrun_share']:.1%}" for r in late)
        text += (
            f" Phases overran their nominal time by more than {plan.max_overrun:.1%} in {cases}: processors"
            " are saturated and these figures not valid. Raise --slow-motion, or use a machine that does"
            " nothing else."
        )
    return text + " The same command with --resume measures the rest."


def _figures(rows: Sequence[Row], config: RunConfig, plan: Plan) -> dict[str, Any]:
    figures = {
        "worst_error_ratio": max(abs(row["ratio"] - 1.0) for row in rows),
        "gradients_bit_equal": all(row["gradients_bit_equal"] for row in rows),
        "cases": rows,
        "all_to_all_to_compute_ratio": plan.ratio,
        "slow_motion": plan.slow_motion,
        "routing": plan.routing,
        "ranks": config.num_processes,
        "num_microbatches": config.schedule.num_microbatches,
        "rounds": plan.rounds,
    }
    if plan.slow_motion is not None:
        figures["largest_overrun_share"] = max(row["overrun_share"] for row in rows)
    return figures


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_rank_options(parser)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every case (3)")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are measured already")
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes (no limit)")


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
        tuple(product(options.schedules, options.modes)),
        options.ratio,
        options.rounds,
        slow_motion_of(options),
        options.max_overrun,
        options.routing,
        None if options.minutes is None else 60.0 * options.minutes,
    )
    if not plan.ratio > 0 or plan.rounds < 1:
        raise ValueError(f"ratio={plan.ratio} must be above 0 and rounds={plan.rounds} at least 1.")
    stem = f"simulator_{options.ranks}_ranks"
    settings = {name: value for name, value in conditions().items() if name in SAME} | {
        "config": config.model_dump(mode="json"),
        "ratio": plan.ratio,
        "rounds": plan.rounds,
        "slow_motion": plan.slow_motion,
        "routing": plan.routing,
    }
    open_file = Unfinished.resume if options.resume else Unfinished.begin
    unfinished = open_file(options.results / f"{stem}.unfinished.jsonl", settings)
    figures = _figures(run(config, plan, unfinished), config, plan)
    return Outcome(stem, label_of(options), figures, _table(figures), replaces=unfinished.path)


BENCH = Bench("simulator", __doc__, _add_options, _measure, _settings)

if __name__ == "__main__":
    BENCH.main()
