"""Stability study: deep narrow models of several residual kinds, same data and steps, several seeds.

Every part (one variant, one seed) leaves a file in --parts; a part that the same code has left there already
is not run again, so the study can be interrupted and continued, and extended by seeds and variants.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mhc_dist.bench.result import conditions, write_result
from mhc_dist.config import load_config
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.study.instruments import GAINS
from mhc_dist.study.part import PartPlan, run_part
from mhc_dist.study.plots import plot_stability
from mhc_dist.study.summary import measured_records, summarize
from mhc_dist.study.variants import MAIN, OPTIONS, VARIANTS, variant_config

DEFAULT_CONFIG = Path("configs/study.yaml")
NAME = "study_stability"
NUM_POINTS = 100
"""Of a curve in the result."""

GAIN_DIGITS = 9
"""Behind the point: bounded gains are within a millionth of 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist study stability", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--variants", nargs="+", default=list(MAIN), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="of --variants; --options are run with one (3)")
    parser.add_argument("--workers", type=int, default=2, help="parts that run at a time, a core each (2)")
    parser.add_argument("--parts", type=Path, default=Path("runs/study_stability"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        figures = run(options)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        print(f"mhc-dist: interrupted; what is done lies in {options.parts}. The same command goes on.")
        return ExitCode.STOPPED
    command = " ".join(["mhc-dist study stability", *(sys.argv[1:] if arguments is None else arguments)])
    label = "measured: one process and one thread a model, CPU, fp32"
    path = write_result(NAME, options.results, command, label, figures)
    picture = plot_stability(figures["curves"], options.results / f"{NAME}.png")
    print(f"{label}; written to {path} and {picture}")
    print(json.dumps(figures["claims"]))
    return ExitCode.OK


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All parts that are not done yet, then what they say together."""
    if options.seeds < 1 or options.workers < 1:
        raise ValueError(f"--seeds {options.seeds} --workers {options.workers}: at least 1 of each is needed")
    overrides = tuple(options.set)
    config = load_config(options.config, overrides)
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.variants]
    wanted += [(name, 0) for name in options.options if name not in options.variants]
    for name, seed in wanted:
        variant_config(config, name, seed)  # what cannot be run is said before anything runs
    commit = conditions()["commit"]
    plans = [PartPlan(options.config, overrides, name, seed, options.parts, commit) for name, seed in wanted]
    parts: dict[str, list[dict[str, Any]]] = {}
    for result in _results(plans, options.workers):
        parts.setdefault(result["variant"], []).append(result)
    ordered = {name: sorted(parts[name], key=lambda r: r["seed"]) for name in VARIANTS if name in parts}
    model = config.model
    return {
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "steps": config.train.steps,
        "tokens_per_step": config.tokens_per_step,
        **summarize(ordered),
        "curves": {name: [_curve(result) for result in results] for name, results in ordered.items()},
    }


def _results(plans: Sequence[PartPlan], workers: int) -> list[dict[str, Any]]:
    results = [result for plan in plans if (result := plan.done()) is not None]
    left = [plan for plan in plans if plan.done() is None]
    print(f"{len(results)} of {len(plans)} parts are there already", flush=True)
    if not left:
        return results
    # A fresh interpreter for each worker: a forked one would share torch's thread pool.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
        for future in as_completed([pool.submit(run_part, plan) for plan in left]):
            result = future.result()
            results.append(result)
            print(
                f"{len(results)} of {len(plans)}: {result['variant']} seed {result['seed']}, validation loss"
                f" {result['validation_loss']:.4f}, {result['seconds']:.0f} s",
                flush=True,
            )
    return results


def _curve(result: dict[str, Any]) -> dict[str, Any]:
    """What a picture needs of a part: values over `steps`, gains over `measured_steps` and over layers."""
    records, measured = result["records"], measured_records(result)
    stride = max(1, len(records) // NUM_POINTS)
    groups = [records[first : first + stride] for first in range(0, len(records), stride)]
    return {
        "seed": result["seed"],
        "validation_loss": result["validation_loss"],
        "steps": [group[0]["step"] for group in groups],
        "loss": [round(group[0]["loss"], 4) for group in groups],
        # A spike must not fall between two points.
        "grad_norm": [round(max(record["grad_norm"] for record in group), 4) for group in groups],
        "measured_steps": [record["step"] for record in measured],
        **{key: [round(record[key], GAIN_DIGITS) for record in measured] for key in GAINS},
        **{
            f"depth_{direction}": [round(gain, GAIN_DIGITS) for gain in result["depth"].get(direction, [])]
            for direction in ("forward", "backward")
        },
    }


if __name__ == "__main__":
    sys.exit(main())
