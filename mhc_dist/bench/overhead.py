"""`mhc-dist bench overhead`: a step with hyper-connections against the same step with the plain residual.

One process and one thread, same layers, same schedule, variants taking turns within one run. The breakdown
says in which kind of action the difference lies. Nothing overlaps here: it is the cost of the mathematics on
this processor, before any hiding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.result import shown_command, write_result
from mhc_dist.config import RunConfig, load_config
from mhc_dist.config_sections import KernelsConfig, ResidualKind
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.trace import StepPhase
from mhc_dist.plan.run_programs import plan_run

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench.yaml"
RESIDUAL = "residual"
PAPER_3B_WIDTHS = (
    "model.hidden_size=1280",
    "model.expert_dim=896",
    "model.num_layers=2",
    "model.num_heads=16",
    "model.head_dim=128",
    "model.value_dim=128",
    "model.rope_dim=64",
    "model.kv_rank=512",
    "model.num_active_experts=6",
    "model.num_shared_experts=2",
)
"""Table 5 of the paper; fewer layers, and eight experts, of which six are active as there."""


class _Variant:
    """One kind of connection with one backend."""

    def __init__(self, config: RunConfig) -> None:
        self._programs = plan_run(config)
        self._stage = whole_stage(config, self._programs)
        self._microbatches = random_microbatches(config)
        self.seconds: list[float] = []
        self.phases: list[dict[StepPhase, float]] = []

    def run(self, *, keep: bool) -> None:
        for parameter in self._stage.parameters():
            parameter.grad = None
        nobody = Nobody()
        start = perf_counter()
        output = Executor(0, self._stage.by_index, nobody).run(
            self._programs.training, self._microbatches, nobody
        )
        if keep:
            self.seconds.append(perf_counter() - start)
            self.phases.append(output.trace.phase_seconds())


def _alone(config: RunConfig, backend: str | None) -> RunConfig:
    """The run on one process; with `backend`'s hyper-connections, or (None) the plain residual."""
    parallel = config.parallel.model_copy(update={"pipeline": 1, "data": 1, "expert": 1})
    schedule = config.schedule.model_copy(update={"cluster": None})
    update: dict[str, Any] = {"parallel": parallel, "schedule": schedule}
    if backend is None:
        update["residual"] = config.residual.model_copy(
            update={"kind": ResidualKind.RESIDUAL, "num_streams": 1}
        )
        update["recompute"] = config.recompute.model_copy(update={"mode": "none"})
    else:
        update["kernels"] = KernelsConfig(backend=backend)  # type: ignore[arg-type]
    return RunConfig.model_validate(config.model_copy(update=update).model_dump())


def run(config: RunConfig, backends: Sequence[str], rounds: int) -> dict[str, Any]:
    """Figures of all backends against the plain residual."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1.")
    torch.set_num_threads(1)
    variants = {RESIDUAL: _Variant(_alone(config, None))}
    variants |= {backend: _Variant(_alone(config, backend)) for backend in backends}
    for turn in range(rounds + 1):
        for variant in variants.values():
            variant.run(keep=turn > 0)
    base = variants[RESIDUAL]
    base_seconds = statistics.median(base.seconds)

    def overhead(variant: _Variant) -> float:
        pairs = zip(variant.seconds, base.seconds, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs) - 1.0

    def breakdown(variant: _Variant) -> dict[str, float]:
        return {
            phase.value: statistics.median(
                (a.get(phase, 0.0) - b.get(phase, 0.0)) / base_seconds
                for a, b in zip(variant.phases, base.phases, strict=True)
            )
            for phase in (
                StepPhase.FORWARD,
                StepPhase.BACKWARD,
                StepPhase.WEIGHT_GRADIENT,
                StepPhase.RECOMPUTE,
            )
        }

    overheads = {name: overhead(variant) for name, variant in variants.items() if name != RESIDUAL}
    best = min(overheads, key=overheads.__getitem__)
    return {
        "overhead_ratio": overheads[best],
        "backend": best,
        "hidden_size": config.model.hidden_size,
        "num_streams": config.residual.num_streams,
        "recompute": config.recompute.mode,
        "tokens_per_microbatch": config.data.sequences_per_microbatch * config.data.sequence_length,
        "rounds": rounds,
        "overhead_by_backend": overheads,
        "breakdown": breakdown(variants[best]),
        "step_seconds": {name: statistics.median(variant.seconds) for name, variant in variants.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mhc-dist bench overhead", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--backends", nargs="+", default=["cpu"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, [*PAPER_3B_WIDTHS, *options.set])
        figures = run(config, options.backends, options.rounds)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        sys.exit(2)
    label = "measured: one process, one thread, CPU, nothing overlapped"
    command = shown_command("overhead", arguments)
    path = write_result("overhead", options.results, command, label, figures)
    print(f"{label}; written to {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
