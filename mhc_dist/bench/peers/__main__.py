"""`mhc-dist bench peers`: the same layers under DeepSpeed's DualPipeV, torch's, and this project's.

Same weights, same data, same link for every all-to-all and every message between pipeline ranks, in turn
within one run. Before anything is timed, all engines have computed the same losses and gradients. Timed are
all forwards and backwards of a step, without reduction and optimizer.

--compute real: two ranks on two cores, one pipeline rank with two chunks, experts over both. --compute
nominal: four ranks, two pipeline ranks; every phase lasts its measured single-rank time, in slow motion, so
that ranks that share a core do not wait for each other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

from mhc_dist.bench.peers.figures import OURS, OURS_MHC
from mhc_dist.bench.peers.ranks import Plan, measure
from mhc_dist.bench.result import shown_command, write_result
from mhc_dist.config import load_config

DEFAULT_CONFIG = Path(__file__).resolve().parents[3] / "configs" / "bench.yaml"
NOMINAL_SIZES = (
    "parallel.pipeline=2",
    "model.num_layers=8",
    "model.hidden_size=128",
    "model.expert_dim=128",
    "model.num_active_experts=4",
    "data.sequence_length=128",
)
"""Small enough that four ranks' real compute fits into nominal time on two cores."""

LABELS = {
    "real": "emulated link; compute measured, two ranks on two cores",
    "nominal": "emulated link; nominal compute: measured single-rank times in slow motion",
}


def run(plan: Plan) -> dict[str, Any]:
    """Start the ranks and return rank 0's figures."""
    _check(plan)
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        result = Path(folder) / "figures.json"
        # Forked: the ranks share what is imported already.
        start_processes(
            measure, (f"{folder}/store", plan, result), nprocs=plan.config.num_processes, start_method="fork"
        )
        figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def _check(plan: Plan) -> None:
    parallel, schedule = plan.config.parallel, plan.config.schedule
    if parallel.expert != parallel.data or parallel.data < 2:
        raise ValueError(
            f"parallel.expert={parallel.expert} of parallel.data={parallel.data}: the comparison needs experts"
            " over all data ranks, at least two. Set both to 2."
        )
    if plan.compute == "real" and parallel.pipeline != 1:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} with real compute: times are only measured on one pipeline"
            " rank. Set parallel.pipeline=1 or pass --compute nominal."
        )
    if schedule.name != "dualpipev" or schedule.num_microbatches < 2 * parallel.pipeline:
        raise ValueError(
            f"schedule.name={schedule.name} with {schedule.num_microbatches} microbatches: the peers run"
            f" DualPipeV with at least {2 * parallel.pipeline}. Set schedule.name=dualpipev and raise"
            " schedule.num_microbatches."
        )
    if not plan.ratio > 0 or plan.rounds < 1 or not plan.slow_motion >= 1:
        raise ValueError(
            f"ratio={plan.ratio} must be above 0, rounds={plan.rounds} and slow_motion={plan.slow_motion} at"
            " least 1."
        )


def _table(figures: dict[str, Any]) -> str:
    def against(ours: str, name: str) -> str:
        found = figures["speedups"][ours].get(name)
        return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""

    lines = [f"{'':36}{'step':>9}{'peak':>11}  {'over ' + OURS:24}  over {OURS_MHC}"]
    for name, seconds in figures["step_seconds"].items():
        peak = f"{figures['peak_bytes'][name] / 2**20:.1f} MiB"
        lines.append(
            f"{name:36}{seconds:7.3f} s{peak:>11}  {against(OURS, name):24}  {against(OURS_MHC, name)}"
        )
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mhc-dist bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", choices=sorted(LABELS), default="real")
    parser.add_argument("--ratio", type=float, default=1.0, help="all-to-all time over compute time (1)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every engine (9)")
    parser.add_argument(
        "--slow-motion", type=float, default=6.0, help="nominal over measured compute time (6)"
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="(configs/bench.yaml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of it"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder for the figures (results)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = parser.parse_args(arguments)
    sizes = NOMINAL_SIZES if options.compute == "nominal" else ()
    try:
        config = load_config(options.config, [*sizes, *options.set])
        figures = run(Plan(config, options.compute, options.ratio, options.rounds, options.slow_motion))
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        sys.exit(2)
    label = LABELS[options.compute]
    command = shown_command("peers", arguments)
    path = write_result(f"peers_{options.compute}", options.results, command, label, figures)
    if not options.json:
        print(f"{label}; written to {path}")
        print(_table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
