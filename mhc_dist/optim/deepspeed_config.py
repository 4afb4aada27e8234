"""The configuration that DeepSpeed's engine is built from."""

from __future__ import annotations

from typing import Any

from mhc_dist.config import RunConfig
from mhc_dist.optim.deepspeed_options import check_config


def engine_config(config: RunConfig) -> dict[str, Any]:
    """The configuration DeepSpeed gets: ours, plus what the run passes through (checked first)."""
    check_config(config.deepspeed)
    microbatch_size, num_microbatches = config.data.sequences_per_microbatch, config.schedule.num_microbatches
    ours = {
        "train_batch_size": microbatch_size * num_microbatches * config.parallel.data,
        "train_micro_batch_size_per_gpu": microbatch_size,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": config.optim.gradient_clipping,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        # Both default to the model's dtype, which is wrong for bf16.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    return {**config.deepspeed, **ours}
