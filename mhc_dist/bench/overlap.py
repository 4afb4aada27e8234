"""`mhc-dist bench overlap`: what placement hides, on a slow link, against the same steps without it.

Variants take turns within one run, on the same batches and to the same bits, step by step:

    no overlap             phases one after the other, every exchange awaited where its result is needed
    no overlap, recompute  the same, streams recomputed right before their use
    overlap                phases placed; nothing recomputed
    overlap, late          phases placed; streams recomputed right before their use
    overlap, placed        phases placed, recomputation too

Steps of the first two tell the simulator what phases cost at the time, and it predicts the others.

--ranks 2: one pipeline rank, experts over two, real compute on two cores. --ranks 4 and 8: two and four
pipeline ranks, experts over two, in delay mode: every phase lasts its single-process time, in slow motion.

--link veth: not an emulated link but ranks in network namespaces, joined at a limited rate by the kernel;
needs root and iproute2, and goes with --ranks 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from mhc_dist.bench.calibrated import calibrated_by, settle
from mhc_dist.bench.cell import Cell, Mode, Runner, run_ranks, with_recompute
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.costs import machine_of
from mhc_dist.bench.equality import Equality, all_of, compared
from mhc_dist.bench.hidden import HiddenReport, hidden_report, together
from mhc_dist.bench.namespaces import LABEL as VETH_LABEL
from mhc_dist.bench.namespaces import MAX_RATE, ShapedNetwork
from mhc_dist.bench.overrun import Overrun
from mhc_dist.bench.peers.ratio import paired_ratio
from mhc_dist.bench.ranks import add_rank_options, label_of, rank_settings, slow_motion_of
from mhc_dist.bench.routing import Rule
from mhc_dist.bench.simulated import prediction
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import Pass
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.placement import Placement
from mhc_dist.pipeline.trace import Event
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program

MODES: tuple[Mode, ...] = ("none", "mhc")
NO_OVERLAP, NO_OVERLAP_RECOMPUTE = "no_overlap", "no_overlap_recompute"
OVERLAP, LATE, PLACED = "overlap", "overlap_late_recompute", "overlap_placed"
RECOMPUTES: dict[str, Mode] = {
    NO_OVERLAP: "none",
    NO_OVERLAP_RECOMPUTE: "mhc",
    OVERLAP: "none",
    LATE: "mhc",
    PLACED: "mhc",
}
PLAIN: dict[Mode, str] = {"none": NO_OVERLAP, "mhc": NO_OVERLAP_RECOMPUTE}
PLACEMENTS = {OVERLAP: Placement(), LATE: Placement(prefetch_recompute=False), PLACED: Placement()}


@dataclass(frozen=True)
class Plan:
    """ratio: all-to-all over compute. slow_motion: nominal over measured time, None computes in real time.

    network: namespaces to run in; None for an emulated link.
    """

    ratio: float
    rounds: int
    slow_motion: float | None
    max_overrun: float
    routing: Rule
    network: ShapedNetwork | None = None


@dataclass
class _Variant:
    """One way to run the step, and what it has shown so far on this rank."""

    runner: Runner
    costs: CostTable
    seconds: list[float] = field(default_factory=list)
    steps: list[list[Event]] = field(default_factory=list)
    overrun: Overrun = field(default_factory=Overrun)


def measure(rank: int, store: str, config: RunConfig, plan: Plan, result: Path) -> None:
    """One rank of the bench. Rank 0 writes its figures to `result`."""
    if plan.network is not None:
        plan.network.enter(rank)
    links = lower(schedule_of(config), own_shapes(config).chunks).links
    on_network = plan.network is not None
    cell = Cell.join(rank, store, config, links, plan.routing, on_network=on_network)
    settled = settle(cell, MODES, plan.ratio, plan.slow_motion, plan.network)
    costs, link = settled.costs, settled.link
    programs = {name: settled.plain[mode] for mode, name in PLAIN.items()}
    for name, placement in PLACEMENTS.items():
        own = with_recompute(config, RECOMPUTES[name])
        programs[name] = cell.made_by_rank_0(
            partial(placed_program, own, machine_of(own), placement, costs[RECOMPUTES[name]])
        )
    variants = {}
    for name, program in programs.items():
        validate(program)
        mode = RECOMPUTES[name]
        nominal = None if plan.slow_motion is None else costs[mode]
        variants[name] = _Variant(
            cell.runner(settled.stages[mode], program, nominal, settled.emulated), costs[mode]
        )

    in_delay_mode = plan.slow_motion is not None
    equality = _alternate(cell, variants, plan.rounds, in_delay_mode=in_delay_mode)
    everyone = {
        name: cell.gather(([hidden_report(step, link.seconds) for step in variant.steps], variant.overrun))
        for name, variant in variants.items()
    }
    known = {
        mode: [
            calibrated_by(cell, costs[mode], [step], in_delay_mode=in_delay_mode)
            for step in variants[name].steps
        ]
        for mode, name in PLAIN.items()
    }
    if rank == 0:
        simulated = {
            name: prediction(variant.runner.program, known[RECOMPUTES[name]], variant.seconds)
            for name, variant in variants.items()
        }
        figures = _figures(variants, everyone, plan) | {
            **equality.figures(),
            "simulator": simulated,
            "all_to_all_to_compute_ratio": plan.ratio,
            "slow_motion": plan.slow_motion,
            "routing": plan.routing,
            "link": "emulated" if plan.network is None else "veth, tbf",
            "link_bytes_per_second": link.bytes_per_second,
            "link_latency_seconds": link.latency_seconds,
            "ranks": config.num_processes,
            "pipeline": config.parallel.pipeline,
            "expert": config.parallel.expert,
            "schedule": config.schedule.name,
            "num_microbatches": config.schedule.num_microbatches,
        }
        result.write_text(json.dumps(figures))
    cell.leave()


def _alternate(cell: Cell, variants: dict[str, _Variant], rounds: int, *, in_delay_mode: bool) -> Equality:
    """Steps in turn; the first turn warms up. Every step's gradients are compared with those of the first.

    RuntimeError on all ranks when they differ on one. Collective.
    """
    want: dict[str, Tensor] = {}
    equality = Equality()
    for turn in range(rounds + 1):
        found = Equality()
        for name, variant in variants.items():
            seconds, trace = variant.runner.step()
            gradients = variant.runner.gradients()
            if not want:
                want = {key: gradient.clone() for key, gradient in gradients.items()}
            else:
                found += compared(want, gradients, name)
            if turn == 0:
                continue
            variant.seconds.append(seconds)
            variant.steps.append(trace.events)
            if in_delay_mode:
                variant.overrun += Overrun.of(trace.events, variant.costs)
        found = all_of(cell.gather(found))
        found.check()
        equality += found
    return equality


def _figures(
    variants: dict[str, _Variant],
    everyone: dict[str, list[tuple[list[HiddenReport], Overrun]]],
    plan: Plan,
) -> dict[str, Any]:
    """All ranks' seconds, step by step; medians over steps."""
    reports = {
        name: [together(of_step) for of_step in zip(*(reports for reports, _ in ranks), strict=True)]
        for name, ranks in everyone.items()
    }
    overrun = sum((overrun for ranks in everyone.values() for _, overrun in ranks), Overrun())

    def median_of(name: str, figure: Callable[[HiddenReport], float | None]) -> float | None:
        values = [value for report in reports[name] if (value := figure(report)) is not None]
        return median(values) if values else None

    def shares_of(name: str) -> dict[str, float]:
        found = [report.exposed_shares() for report in reports[name]]
        return {key: median(shares[key] for shares in found) for key in found[0]}

    forward, backward = Pass.FORWARD, Pass.BACKWARD
    base = variants[NO_OVERLAP].seconds
    return {
        "all_to_all_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio()),
        "forward_combine_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio(("combine", forward))),
        "backward_combine_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio(("combine", backward))),
        "recompute_hidden_ratio": median_of(PLACED, lambda r: r.recompute_hidden_ratio),
        "all_to_all_hidden_ratio_without_late_peers": median_of(
            PLACED, lambda r: r.hidden_ratio(wire_only=True)
        ),
        "all_to_all_to_compute_measured": median_of(NO_OVERLAP, lambda r: r.flight_to_compute_ratio),
        "rounds": len(base),
        "step_seconds": {name: median(variant.seconds) for name, variant in variants.items()},
        "speedup_over_no_overlap": {
            name: asdict(paired_ratio(base, variant.seconds)) for name, variant in variants.items()
        },
        "all_to_all_hidden": {name: median_of(name, lambda r: r.hidden_ratio()) for name in variants},
        "recompute_hidden": {name: median_of(name, lambda r: r.recompute_hidden_ratio) for name in variants},
        "exposed_shares": {name: shares_of(name) for name in variants},
        **(overrun.figures() if plan.slow_motion is not None else {}),
        "_overrun": asdict(overrun),
    }


def run(config: RunConfig, plan: Plan, *, veth: bool = False) -> dict[str, Any]:
    """Start the ranks and return their figures. ValueError when they ask for what cannot be measured.

    veth: in network namespaces, instead of on an emulated link.
    """
    parallel = config.parallel
    if parallel.expert < 2 or parallel.expert != parallel.data:
        raise ValueError(
            f"parallel.expert={parallel.expert} of parallel.data={parallel.data}: the overlap bench needs"
            " experts over all data ranks, at least two. Set parallel.data=2 and parallel.expert=2."
        )
    if plan.slow_motion is None and parallel.pipeline != 1:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} with real compute: more ranks than cores hide each"
            " other's waits. Pass --ranks 4 or 8, which run in delay mode, or set parallel.pipeline=1."
        )
    if not plan.ratio > 0 or plan.rounds < 1:
        raise ValueError(f"ratio={plan.ratio} must be above 0 and rounds={plan.rounds} at least 1.")
    if veth:
        if plan.slow_motion is not None:
            raise ValueError("--link veth goes with --ranks 2: in slow motion a rate would mean nothing.")
        with ShapedNetwork(config.num_processes, MAX_RATE) as network:
            figures = run_ranks(measure, config, replace(plan, network=network))
    else:
        figures = run_ranks(measure, config, plan)
    Overrun(**figures.pop("_overrun")).check(plan.max_overrun)
    return figures


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_rank_options(parser)
    parser.add_argument("--link", choices=("emulated", "veth"), default="emulated", help="(emulated)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every variant (7)")


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{'':26}{'step':>9}{'speedup':>9}{'hidden':>8}{'recompute':>11}{'fill':>7}{'steady':>8}"]
    lines[0] += f"{'drain':>7}{'peer':>7}{'simulated':>11}"
    for name, seconds in figures["step_seconds"].items():
        shares, recompute = figures["exposed_shares"][name], figures["recompute_hidden"][name]
        lines.append(
            f"{name:26}{seconds:7.3f} s{figures['speedup_over_no_overlap'][name]['median']:9.2f}"
            f"{figures['all_to_all_hidden'][name]:8.1%}{'' if recompute is None else f'{recompute:.1%}':>11}"
            f"{shares['fill']:7.1%}{shares['steady']:8.1%}{shares['drain']:7.1%}{shares['peer']:7.1%}"
            f"{figures['simulator'][name]['ratio']:11.2f}"
        )
    if "overrun_share" in figures:
        lines.append(f"phases overran their nominal time by {figures['overrun_share']:.1%}")
    return "\n".join(lines)


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    plan = Plan(options.ratio, options.rounds, slow_motion_of(options), options.max_overrun, options.routing)
    veth = options.link == "veth"
    figures = run(config, plan, veth=veth)
    stem = f"overlap_{options.ratio:g}" + ("" if options.ranks == 2 else f"_{options.ranks}_ranks")
    label = label_of(options, VETH_LABEL) if veth else label_of(options)
    return Outcome(stem + ("_veth" if veth else ""), label, figures, _table(figures))


BENCH = Bench("overlap", __doc__, _add_options, _measure, rank_settings)

if __name__ == "__main__":
    BENCH.main()
