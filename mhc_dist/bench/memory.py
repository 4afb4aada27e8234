"""`mhc-dist bench memory`: bytes kept between forward and backward, per recompute mode, against the formula.

One process, one microbatch through all chunks; bytes are counted by the allocator right before the first
backward action, so the load of the machine does not matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mhc_dist.bench.alone import Nobody, random_microbatches, whole_stage
from mhc_dist.bench.heap import heap_bytes
from mhc_dist.bench.result import shown_command, write_result
from mhc_dist.config import RunConfig, load_config
from mhc_dist.config_sections import RecomputeConfig
from mhc_dist.parallel.recompute import best_block, phase_blocks
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.executor import Executor
from mhc_dist.plan.run_programs import RunPrograms, plan_run

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench.yaml"
Mode = Literal["none", "mhc", "full"]
FORWARD_KINDS = (ActionKind.COMPUTE, ActionKind.ISSUE, ActionKind.WAIT, ActionKind.HAND_OVER)


def alone(config: RunConfig, mode: Mode) -> RunConfig:
    """The run's model on one process, one microbatch, forward of all chunks before any backward."""
    parallel = config.parallel.model_copy(update={"pipeline": 1, "data": 1, "expert": 1})
    schedule = config.schedule.model_copy(update={"name": "gpipe", "num_microbatches": 1, "cluster": None})
    recompute = RecomputeConfig(mode=mode, block=config.recompute.block)
    return config.model_copy(
        update={"parallel": parallel, "schedule": schedule, "recompute": recompute, "deepspeed": {}}
    )


def kept_bytes(config: RunConfig, mode: Mode) -> int:
    """Heap bytes that the forward leaves behind for the backward."""
    config = alone(config, mode)
    programs = plan_run(config)
    stage = whole_stage(config, programs)
    before = 0
    held: list[int] = []

    def look(action: Action) -> None:
        if action.kind not in FORWARD_KINDS and not held:
            gc.collect()
            held.append(heap_bytes() - before)

    nobody = Nobody()
    microbatches = random_microbatches(config)
    executor = Executor(0, stage.by_index, nobody, look)
    for _ in range(2):  # the first run pays for what is allocated once: imports, rotary tables, gradients
        held.clear()
        gc.collect()
        before = heap_bytes()
        executor.run(programs.training, microbatches, nobody)
    return held[0]


def droppable_bytes(config: RunConfig, programs: RunPrograms) -> tuple[int, int]:
    """What the formula says of streams and sublayer inputs: (kept by mode none, kept by mode mhc).

    Every sublayer makes n + 1 rows a token: its streams and its input. Recomputing keeps the n rows at the
    start of each block (mHC paper, 4.3.2; y_l and the coefficients stay in both modes).
    """
    n = config.residual.num_streams
    value_bytes = 4 if config.train.precision == "fp32" else 2
    tokens = config.data.sequences_per_microbatch * config.data.sequence_length
    row_bytes = tokens * config.model.hidden_size * value_bytes
    everything = kept = 0
    for place, shape in zip(programs.places, programs.training.chunks, strict=True):
        num_sublayers = 2 * (place.last_layer - place.first_layer)
        block = config.recompute.block
        length = best_block(num_sublayers, n) if block == "auto" else block
        everything += num_sublayers * (n + 1) * row_bytes
        kept += len(phase_blocks(shape, length)) * n * row_bytes
    return everything, kept


def run(config: RunConfig) -> dict[str, Any]:
    """Figures of all modes."""
    modes: tuple[Mode, ...] = ("none", "mhc", "full")
    kept = {mode: kept_bytes(config, mode) for mode in modes}
    everything, starts = droppable_bytes(config, plan_run(alone(config, "mhc")))
    saved = kept["none"] - kept["mhc"]
    return {
        "saved_bytes_ratio": saved / (everything - starts),
        "kept_bytes": kept,
        "saved_bytes": saved,
        "formula_saved_bytes": everything - starts,
        "formula_kept_bytes": {"none": everything, "mhc": starts},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mhc-dist bench memory", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        figures = run(load_config(options.config, options.set))
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        sys.exit(2)
    label = "measured: bytes counted by the allocator, one process, CPU"
    command = shown_command("memory", arguments)
    path = write_result("memory", options.results, command, label, figures)
    print(f"{label}; written to {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
