"""`mhc-dist results scaling`: weak scaling of simulated steps to 4096 devices, and what planning costs there.

Steps are simulated. What it takes to make their programs, and what of a start grows with the number of ranks,
is measured, each size in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mhc_dist.bench.result import write_result
from mhc_dist.config import load_config
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.weak_scaling import Point, deeper, making_figures, series, step_figures
from mhc_dist.results.meshes import mesh_figures
from mhc_dist.results.starting import starting_figures

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "paper_27b.yaml"
PIPELINES = (1, 2, 4, 8, 16, 32)
WORLDS = (512, 4096, 40960)
MESHES = (4, 8, 16, 32)
LABEL = (
    "simulated: steps, on costs derived from data sheets; measured: seconds and bytes of making programs and"
    " groups, one process, CPU"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist results scaling", description=__doc__)
    parser.add_argument(
        "--cluster", default="h800", help="a cluster file, or a name in configs/clusters (h800)"
    )
    parser.add_argument("--pipelines", nargs="+", type=int, default=list(PIPELINES), metavar="RANKS")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        figures = run(options.cluster, options.pipelines)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    command = " ".join(["mhc-dist results scaling", *(sys.argv[1:] if arguments is None else arguments)])
    path = write_result("scaling", options.results, command, LABEL, figures)
    print(f"{LABEL}; written to {path}")
    print(json.dumps({"efficiency_at_most_devices": figures["efficiency_at_most_devices"]}))
    return ExitCode.OK


def run(cluster: str, pipelines: Sequence[int]) -> dict[str, Any]:
    """Everything, one after the other: nothing else must run on the processors meanwhile."""
    config, machine = load_config(CONFIG), Machine(load_cluster(cluster))
    costs = [alone(making, cluster, deeper(pipeline)) for pipeline in pipelines]
    starts = [alone(starting_figures, world) for world in WORLDS]
    meshes = alone(connected, MESHES)["meshes"]
    points = [step_figures(config, machine, point) for point in series()]
    first: dict[str, float] = {}
    for point in points:
        used = point["model_flops_utilization"]
        point["efficiency"] = used / first.setdefault(point["series"], used)
    return {
        "cluster": cluster,
        "points": points,
        "costs": costs,
        "starts": starts,
        "meshes": meshes,
        "efficiency_at_most_devices": {p["series"]: p["efficiency"] for p in points},
    }


def making(cluster: str, point: Point) -> dict[str, Any]:
    return making_figures(load_config(CONFIG), Machine(load_cluster(cluster)), point)


def connected(worlds: Sequence[int]) -> dict[str, Any]:
    return {"meshes": mesh_figures(worlds)}


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a fresh process, so that its memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
