"""Which of DeepSpeed's options a run may set.

Standard library only, so that the launcher can refuse a bad option before any process starts. Options are
allowed one by one: an option that is passed on but has no effect here would be a silent lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALLOWED = {
    "tensorboard": "monitor",
    "wandb": "monitor",
    "csv_monitor": "monitor",
    "comet": "monitor",
    "comms_logger": "log of DeepSpeed's own collectives",
    "dump_state": "print the engine's state at start",
    "log_level": "DeepSpeed's verbosity",
    "zero_optimization": "only stage 1, without overlap_comm",
    "communication_data_type": "only fp32",
    "data_types": "only grad_accum_dtype fp32",
}
"""Options that may be written under `deepspeed:`, and what they do."""

OWNED = {
    "optimizer": "optim.*",
    "scheduler": "optim.warmup_steps and optim.decay_at",
    "gradient_clipping": "optim.gradient_clipping",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "train_batch_size": "parallel.data, schedule.num_microbatches and data.sequences_per_microbatch",
    "train_micro_batch_size_per_gpu": "data.sequences_per_microbatch",
    "gradient_accumulation_steps": "schedule.num_microbatches",
    "pipeline": "parallel.pipeline and schedule.*",
    "expert_parallel": "parallel.expert",
    "activation_checkpointing": "recompute.*",
    "checkpoint": "checkpoint.*",
    "seed": "train.seed",
    "steps_per_print": "train.*: rank 0 shows progress by itself",
}
"""DeepSpeed options that another section of the run's configuration decides."""

FP32_NAMES = ("fp32", "float32")


def check_config(deepspeed: Mapping[str, Any]) -> None:
    """Raise ValueError for a refused option; the message says what it would break and what to do."""
    for key, value in deepspeed.items():
        match key:
            case "zero_optimization":
                _check_zero(value)
            case "communication_data_type":
                if value not in FP32_NAMES:
                    raise ValueError(
                        f"deepspeed.communication_data_type={value}: gradients are reduced in fp32, because"
                        " bf16 sums were measured to move parameters by 9.8e-3 instead of 3.0e-8 within a few"
                        " steps. Set it to fp32 or remove it."
                    )
            case "data_types":
                _check_data_types(value)
            case "fp16":
                raise ValueError(
                    "deepspeed.fp16: there is no loss scaling here, so fp16 gradients would underflow."
                    " Remove it and set train.precision to bf16 or fp32."
                )
            case "elasticity":
                raise ValueError(
                    "deepspeed.elasticity: the number of processes is fixed by parallel.pipeline x"
                    " parallel.data during a run. Remove it and restart on another topology."
                )
            case _ if key in OWNED:
                raise ValueError(f"deepspeed.{key} is decided by {OWNED[key]}. Remove it and set that.")
            case _ if key not in ALLOWED:
                raise ValueError(
                    f"deepspeed.{key} has no effect here or is not known to be safe. Remove it; these options"
                    f" may be set: {', '.join(sorted(ALLOWED))}."
                )


def _check_zero(zero: Any) -> None:
    if not isinstance(zero, Mapping):
        raise ValueError(f"deepspeed.zero_optimization={zero!r} is not a mapping. Write `stage: 1` under it.")
    stage = zero.get("stage", 1)
    if stage in (2, 3):
        raise ValueError(
            f"deepspeed.zero_optimization.stage={stage}: stages 2 and 3 reduce gradients inside backward"
            " hooks, which never see the weight gradients that zero-bubble schedules put off: these would be"
            " lost. Set it to 1."
        )
    if stage == 0:
        raise ValueError(
            "deepspeed.zero_optimization.stage=0: without ZeRO, DeepSpeed counts expert gradients wrongly"
            " (gradient norm 0, parameters off by 1.4e-4 in a few steps). Set it to 1."
        )
    if stage != 1 or isinstance(stage, bool):
        raise ValueError(f"deepspeed.zero_optimization.stage={stage!r} is not a ZeRO stage. Set it to 1.")
    if zero.get("overlap_comm", False):
        raise ValueError(
            "deepspeed.zero_optimization.overlap_comm=true reduces gradients while microbatches still add to"
            " them. Set it to false; overlap is the schedule's business (schedule.name)."
        )
    for key in zero:
        if key not in ("stage", "overlap_comm"):
            raise ValueError(
                f"deepspeed.zero_optimization.{key} has no effect here: every parameter group is one flat"
                " buffer, reduced at once. Remove it; only stage (1) and overlap_comm (false) may be set."
            )


def _check_data_types(data_types: Any) -> None:
    if not isinstance(data_types, Mapping):
        raise ValueError(f"deepspeed.data_types={data_types!r} is not a mapping. Remove it.")
    for key, value in data_types.items():
        if key != "grad_accum_dtype":
            raise ValueError(f"deepspeed.data_types.{key} is decided by train.precision. Remove it.")
        if value not in FP32_NAMES:
            raise ValueError(
                f"deepspeed.data_types.grad_accum_dtype={value}: microbatch gradients are summed in fp32,"
                " because small ones vanish in a bf16 sum. Set it to fp32 or remove it."
            )
