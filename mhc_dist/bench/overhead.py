"""`mhc-dist bench overhead`: a step with hyper-connections against the same step with the plain residual.

One process and one thread, same layers, same schedule, variants taking turns within one run, in an order that
turns round from round to round. Nothing overlaps here: it is the cost of the mathematics on this processor,
before any hiding. The process never waits, so what it costs is its processor time; wall time, which other
processes lengthen, is given beside it. Compared are typical steps (`typical_step`): medians of single
actions, added up. The breakdown says in which kind of action and in which phase the difference lies.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.bench.typical_step import typical_actions, typical_ratio
from mhc_dist.config import RunConfig
from mhc_dist.config_sections import KernelsConfig, ResidualKind
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.trace import PHASE_OF_KIND, StepPhase
from mhc_dist.plan.run_programs import plan_run

RESIDUAL = "residual"
HIDDEN_SIZE = "model.hidden_size"
PAPER_3B_HIDDEN_SIZE = 1280


def paper_3b_widths(hidden_size: int) -> tuple[str, ...]:
    """Table 5 of the paper; fewer layers, and eight experts, of which six are active as there.

    For another hidden size all other widths in proportion, the size of a head apart.
    """

    def scaled(width: int) -> int:
        return max(1, round(width * hidden_size / PAPER_3B_HIDDEN_SIZE))

    return (
        f"model.hidden_size={hidden_size}",
        f"model.expert_dim={scaled(896)}",
        "model.num_layers=2",
        f"model.num_heads={scaled(16)}",
        "model.head_dim=128",
        "model.value_dim=128",
        "model.rope_dim=64",
        f"model.kv_rank={scaled(512)}",
        "model.num_active_experts=6",
        "model.num_shared_experts=2",
        "schedule.num_microbatches=2",
    )


def _settings(options: argparse.Namespace) -> tuple[str, ...]:
    asked = [value for key, _, value in (item.partition("=") for item in options.set) if key == HIDDEN_SIZE]
    try:
        hidden_size = int(asked[-1]) if asked else PAPER_3B_HIDDEN_SIZE
    except ValueError:
        hidden_size = PAPER_3B_HIDDEN_SIZE  # the configuration refuses what was asked for, in its own words
    return paper_3b_widths(hidden_size)


COMPUTE_PHASES = (StepPhase.FORWARD, StepPhase.BACKWARD, StepPhase.WEIGHT_GRADIENT, StepPhase.RECOMPUTE)

Parts = dict[str, float]
"""Processor seconds by kind of action, and by kind of action and phase (`backward attention`)."""

BETWEEN = (StepPhase.OTHER.value,)
"""What a step takes beside its actions, as an action more."""


class _Stopwatch:
    """Processor seconds of every action, in their order, and which parts of a step it belongs to."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.parts: list[tuple[str, ...]] = []
        self._begin = 0.0

    def begin(self, action: Action) -> None:
        self._begin = process_time()

    def end(self, action: Action, start: float) -> None:
        self.seconds.append(process_time() - self._begin)
        phase = PHASE_OF_KIND[action.kind].value
        self.parts.append((phase, f"{phase} {action.item.partition('.')[0]}") if action.item else (phase,))


class _Variant:
    """One kind of connection with one backend.

    actions: seconds by round and action; parts: those that each action belongs to.
    """

    def __init__(self, config: RunConfig) -> None:
        self._programs = plan_run(config)
        self._stage = whole_stage(config, self._programs)
        self._microbatches = random_microbatches(config)
        self.seconds: list[float] = []
        self.wall_seconds: list[float] = []
        self.actions: list[list[float]] = []
        self.parts: list[tuple[str, ...]] = []

    def run(self, *, keep: bool) -> None:
        self._stage.zero_grad(set_to_none=True)
        nobody, watch = Nobody(), _Stopwatch()
        executor = Executor(0, self._stage.by_index, nobody, watch.begin, stretch=watch.end)
        start, wall_start = process_time(), perf_counter()
        executor.run(self._programs.training, self._microbatches, nobody)
        seconds, wall_seconds = process_time() - start, perf_counter() - wall_start
        if keep:
            self.seconds.append(seconds)
            self.wall_seconds.append(wall_seconds)
            self.actions.append([*watch.seconds, seconds - sum(watch.seconds)])
            self.parts = [*watch.parts, BETWEEN]

    @property
    def typical(self) -> Parts:
        """Typical processor seconds of every part of a step."""
        totals: dict[str, float] = defaultdict(float)
        for seconds, names in zip(typical_actions(np.array(self.actions)), self.parts, strict=True):
            for name in names:
                totals[name] += float(seconds)
        return totals


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
    order = list(variants)
    for turn in range(rounds + 1):
        for name in order if turn % 2 else reversed(order):
            variants[name].run(keep=turn > 0)
    base = variants[RESIDUAL]
    ratios = {name: typical_ratio(variants[name].actions, base.actions) for name in backends}
    best = min(ratios, key=lambda name: ratios[name].ratio)
    return {
        "overhead_ratio": ratios[best].ratio - 1.0,
        "overhead_interval": [ratios[best].low - 1.0, ratios[best].high - 1.0],
        "overhead_ratio_of_whole_steps": median_ratio(variants[best].seconds, base.seconds) - 1.0,
        "overhead_ratio_of_wall_time": median_ratio(variants[best].wall_seconds, base.wall_seconds) - 1.0,
        "backend": best,
        "hidden_size": config.model.hidden_size,
        "num_streams": config.residual.num_streams,
        "recompute": config.recompute.mode,
        "tokens_per_microbatch": config.data.sequences_per_microbatch * config.data.sequence_length,
        "num_microbatches": config.schedule.num_microbatches,
        "rounds": rounds,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "breakdown": _breakdown(variants[best], base),
        "processor_seconds": {name: median(variant.seconds) for name, variant in variants.items()},
        "step_seconds": {name: median(variant.wall_seconds) for name, variant in variants.items()},
        "step_ratios": [round(a / b, 5) for a, b in zip(variants[best].seconds, base.seconds, strict=True)],
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of whole steps, pair by pair: beside the figure of typical actions."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def _breakdown(ours: _Variant, base: _Variant) -> Parts:
    """Difference of every part of a typical step, as a share of the plain residual's.

    Parts with a phase add up to the part without; those without, and what lies between actions, to the
    overhead.
    """
    our_parts, base_parts = ours.typical, base.typical
    whole = float(typical_actions(np.array(base.actions)).sum())
    names = sorted(name for name in {*our_parts, *base_parts} if _is_compute(name))
    return {name: (our_parts.get(name, 0.0) - base_parts.get(name, 0.0)) / whole for name in names}


def _is_compute(name: str) -> bool:
    return name.partition(" ")[0] in {phase.value for phase in COMPUTE_PHASES}


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backends", nargs="+", default=["cpu"], metavar="NAME", help="(cpu)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of every variant (9)")


def _table(figures: dict[str, Any]) -> str:
    low, high = figures["overhead_interval"]
    lines = [
        f"{figures['backend']}: {figures['overhead_ratio']:+.1%} ({low:+.1%} to {high:+.1%}) processor time,"
        f" {figures['overhead_ratio_of_wall_time']:+.1%} wall time"
    ]
    lines += [f"  {name:28}{share:+.2%}" for name, share in figures["breakdown"].items()]
    return "\n".join(lines)


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    figures = run(config, options.backends, options.rounds)
    label = "measured: processor time of one process, one thread, CPU, nothing overlapped"
    return Outcome(f"overhead_{config.model.hidden_size}", label, figures, _table(figures))


BENCH = Bench("overhead", __doc__, _add_options, _measure, _settings)

if __name__ == "__main__":
    BENCH.main()
