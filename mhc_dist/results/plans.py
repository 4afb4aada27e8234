"""`mhc-dist results plans`: what hyper-connections cost, planned for many models, clusters and sizes.

Every cell leaves a file in results/plans; a cell that the same planner has left there for the same run and
cluster is not planned again, so the table can be interrupted and continued. Half a minute a cell on two
quiet cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import mhc_kernels

from mhc_dist.bench.result import write_result
from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.plan.cell import plan_cell
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.evaluate import evaluate
from mhc_dist.plan.layout import Layout
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.search import recompute_blocks
from mhc_dist.study.code_mark import ROOT, code_mark

MODELS = ("paper_27b", "paper_9b", "paper_3b")
CLUSTERS = ("h800", "h100", "b200")
SIZES = (64, 256, 1024, 8)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PLANNER = (
    *(ROOT / name for name in ("plan", "pipeline")),
    *(ROOT / "parallel" / f"{name}.py" for name in ("layout", "partition", "recompute")),
    *(ROOT / "model" / f"{name}.py" for name in ("coefficients", "count", "flops", "seam_spec")),
    *(Path(mhc_kernels.__path__[0], f"{name}.py") for name in ("formula", "launch/sizes", "spec", "tiles")),
)
"""What a cell's figures depend on, of the code."""
LABEL = "simulated: placed programs on costs derived from data sheets and the assumptions of the cluster file"


@dataclass(frozen=True)
class Wanted:
    """A cell of the table."""

    model: str
    cluster: str
    devices: int

    @property
    def stem(self) -> str:
        return f"{self.model}_{self.cluster}_{self.devices}"

    @property
    def command(self) -> str:
        return f"mhc-dist results plans --models {self.model} --clusters {self.cluster} --gpus {self.devices}"

    def asked(self) -> str:
        """What the cell's figures depend on: a hash of run, cluster and planner."""
        config = dump_config(load_config(CONFIGS / f"{self.model}.yaml"))
        cluster = load_cluster(self.cluster).model_dump_json()
        return hashlib.sha256(f"{config}\n{cluster}\n{code_mark(PLANNER)}".encode()).hexdigest()[:16]

    def is_there(self, folder: Path) -> bool:
        path = folder / f"{self.stem}.json"
        if not path.is_file():
            return False
        figures = json.loads(path.read_text())["figures"]
        whole = figures["outcome"] != "planned" or "recomputing" in figures
        return whole and figures["asked"] == self.asked()

    def plan(self) -> dict[str, Any]:
        """Figures of the cell, and how long they took."""
        start = perf_counter()
        config = load_config(CONFIGS / f"{self.model}.yaml")
        machine = Machine(load_cluster(self.cluster))
        cell = plan_cell(config, machine, self.devices)
        if cell["outcome"] == "planned":
            cell["recomputing"] = recomputing(config, machine, cell["plan"])
        return {
            "model": self.model,
            "cluster": self.cluster,
            **cell,
            "planning_seconds": perf_counter() - start,
            "asked": self.asked(),
        }


def recomputing(config: RunConfig, machine: Machine, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The planned layout with streams regenerated, in the blocks that leave most memory: what that costs.

    A search that has memory to spare recomputes nothing, and then switching recomputation off shows nothing.
    """
    layout = Layout(
        plan["schedule"],
        plan["pipeline"],
        plan["expert"],
        plan["data"],
        plan["num_microbatches"],
        boundaries=tuple(plan["boundaries"]),
        sequences=plan["sequences_per_microbatch"],
    )
    blocks = recompute_blocks(config, len(plan["boundaries"]) - 1)
    tried = [evaluate(config, machine, replace(layout, recompute_block=block)) for block in blocks]
    found = min(tried, key=lambda one: (one.peak_bytes, one.step_seconds))
    return {
        "block": found.layout.recompute_block,
        "step_seconds": found.step_seconds,
        "slower": found.step_seconds / plan["step_seconds"] - 1.0,
        "peak_memory_bytes": found.peak_bytes,
        "freed_bytes": plan["peak_memory_bytes"] - found.peak_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist results plans", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="files in configs/")
    parser.add_argument("--clusters", nargs="+", default=list(CLUSTERS), metavar="NAME")
    parser.add_argument("--gpus", nargs="+", type=int, default=list(SIZES), metavar="NUMBER")
    parser.add_argument("--again", action="store_true", help="also plan cells that are there")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    folder = options.results / "plans"
    wanted = [
        Wanted(model, cluster, devices)
        for devices in options.gpus
        for model in options.models
        for cluster in options.clusters
    ]
    try:
        left = [cell for cell in wanted if options.again or not cell.is_there(folder)]
        print(f"{len(wanted) - len(left)} of {len(wanted)} cells are there already", flush=True)
        for cell in left:
            figures = cell.plan()
            write_result(cell.stem, folder, cell.command, LABEL, figures)
            print(f"{cell.stem}: {said(figures)}, {figures['planning_seconds']:.0f} s", flush=True)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        print(f"mhc-dist: interrupted; what is planned lies in {folder}. The same command goes on.")
        return ExitCode.STOPPED
    return ExitCode.OK


def said(figures: dict[str, Any]) -> str:
    """A cell in a few words."""
    if figures["outcome"] == "nothing_fits":
        return f"nothing fits, {figures['missing_bytes'] / 1e9:.1f} GB too much"
    plan = figures["plan"]
    return (
        f"{plan['overhead_ratio_same_layout']:+.1%} in the same layout,"
        f" {plan['overhead_ratio']:+.1%} against the best one"
    )


if __name__ == "__main__":
    sys.exit(main())
