"""`mhc-dist bench peers`: the same layers under DeepSpeed's DualPipeV, torch's, and this project's.

Same weights, same data, same link for every all-to-all and every message between pipeline ranks, in turn
within one run. Before anything is timed, all engines have computed the same losses and gradients. Timed are
all forwards and backwards of a step, without reduction and optimizer.

--compute real: two ranks on two cores, one pipeline rank with two chunks, experts over both. --compute
nominal: four ranks, two of them pipeline ranks; every phase lasts its measured single-rank time, in slow
motion, so that ranks that share a core do not wait for each other.

--link emulated: transfers are held back in user space. --link veth: ranks in network namespaces, joined at a
limited rate by the kernel; needs root and iproute2, and goes with real compute.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from mhc_dist.bench.cell import run_ranks
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.namespaces import LABEL, MAX_RATE, ShapedNetwork
from mhc_dist.bench.overrun import Overrun
from mhc_dist.bench.peers.figures import OURS, OURS_MHC
from mhc_dist.bench.peers.ranks import Plan, measure
from mhc_dist.bench.ranks import add_delay_options, checked_slow_motion
from mhc_dist.config import RunConfig

REAL_SIZES = ("schedule.num_microbatches=16", "data.sequence_length=128")
NOMINAL_SIZES = (
    "parallel.pipeline=2",
    "schedule.num_microbatches=16",
    "model.num_layers=8",
    "model.hidden_size=128",
    "model.expert_dim=128",
    "model.num_active_experts=6",
    "data.sequence_length=64",
)
"""Small enough that four ranks' real compute fits into nominal time on two cores."""

COMPUTE = {
    "real": "compute measured, two ranks on two cores",
    "nominal": "nominal compute: measured single-rank times in slow motion",
}
LINK = {"emulated": "emulated link", "veth": LABEL}


def measured(config: RunConfig, options: argparse.Namespace) -> Outcome:
    """Start the ranks, wait for rank 0's figures."""
    _check(config, options)
    plan = Plan(options.ratio, options.rounds, _slow_motion_of(config, options), options.routing)
    if options.link == "veth":
        with ShapedNetwork(config.num_processes, MAX_RATE) as network:
            figures = run_ranks(measure, config, replace(plan, network=network))
    else:
        figures = run_ranks(measure, config, plan)
    Overrun(**figures.pop("_overrun")).check(options.max_overrun)
    stem = f"peers_{options.compute}" if options.link == "emulated" else f"peers_{options.link}"
    return Outcome(stem, f"{LINK[options.link]}; {COMPUTE[options.compute]}", figures, _table(figures))


def _slow_motion_of(config: RunConfig, options: argparse.Namespace) -> float | None:
    """None for real compute."""
    if options.compute == "nominal":
        return checked_slow_motion(options.slow_motion, config.num_processes)
    if options.slow_motion is not None:
        raise ValueError(
            f"--slow-motion {options.slow_motion:g} with --compute real. Leave it out, or pass --compute"
            " nominal."
        )
    return None


def _check(config: RunConfig, options: argparse.Namespace) -> None:
    parallel, schedule = config.parallel, config.schedule
    if parallel.expert != parallel.data or parallel.data < 2:
        raise ValueError(
            f"parallel.expert={parallel.expert} of parallel.data={parallel.data}: the comparison needs"
            " experts over all data ranks, and at least two of them. Set both to 2."
        )
    if options.compute == "real" and parallel.pipeline != 1:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} with real compute: that is measured on one pipeline rank."
            " Set parallel.pipeline=1 or pass --compute nominal."
        )
    if config.residual.shifted_pre:
        raise ValueError(
            "residual.shifted_pre=true: streams then travel with coefficients in disguise, which the peers'"
            " engines cannot differentiate. Set residual.shifted_pre=false."
        )
    if options.link == "veth" and options.compute != "real":
        raise ValueError("--link veth goes with --compute real: in slow motion a rate would mean nothing.")
    if schedule.name != "dualpipev" or schedule.num_microbatches < 2 * parallel.pipeline:
        raise ValueError(
            f"schedule.name={schedule.name} with {schedule.num_microbatches} microbatches: the peers run"
            f" DualPipeV with at least {2 * parallel.pipeline}. Set schedule.name=dualpipev and raise"
            " schedule.num_microbatches."
        )
    if not options.ratio > 0 or options.rounds < 1:
        raise ValueError(f"ratio={options.ratio} must be above 0 and rounds={options.rounds} at least 1.")


def _table(figures: dict[str, Any]) -> str:
    def against(ours: str, name: str) -> str:
        found = figures["speedups"][ours].get(name)
        return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""

    lines = [f"{'':36}{'step':>9}{'peak':>11}  {'over ' + OURS:26}over {OURS_MHC}"]
    for name, seconds in figures["step_seconds"].items():
        peak = f"{figures['peak_bytes'][name] / 2**20:.1f} MiB"
        row = f"{name:36}{seconds:7.3f} s{peak:>11}  {against(OURS, name):26}{against(OURS_MHC, name)}"
        lines.append(row.rstrip())
    return "\n".join(lines)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compute", choices=sorted(COMPUTE), default="real", help="(real)")
    parser.add_argument("--link", choices=sorted(LINK), default="emulated", help="(emulated)")
    parser.add_argument("--routing", choices=("even", "untrained"), default="even", help="(even)")
    parser.add_argument("--ratio", type=float, default=1.0, help="all-to-all time over compute time (1)")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of every engine (6)")
    add_delay_options(parser)


BENCH = Bench(
    "peers",
    __doc__,
    _add_options,
    measured,
    lambda options: NOMINAL_SIZES if options.compute == "nominal" else REAL_SIZES,
)

if __name__ == "__main__":
    BENCH.main()
