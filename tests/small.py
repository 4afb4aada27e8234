"""Small configurations and batches that tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhc_dist.config import RunConfig

SMALL: dict[str, Any] = {
    "model": {
        "num_layers": 8,
        "num_dense_layers": 1,
        "hidden_size": 32,
        "vocab_size": 61,
        "num_heads": 2,
        "head_dim": 8,
        "value_dim": 12,
        "rope_dim": 4,
        "kv_rank": 16,
        "num_experts": 8,
        "num_active_experts": 2,
        "num_shared_experts": 1,
        "expert_dim": 16,
        "norm_eps": 1e-8,
        "init_std": 0.1,
    },
    "residual": {"kind": "mhc", "num_streams": 4, "alpha_init": 0.5},
    "parallel": {"pipeline": 1, "data": 1, "expert": 1},
    "schedule": {"name": "dualpipev", "num_microbatches": 8},
    "data": {"sequence_length": 12, "sequences_per_microbatch": 1},
    "optim": {"peak_learning_rate": 1e-3, "warmup_steps": 2},
    "train": {"steps": 5},
}


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """`SMALL` with keys of some sections replaced: small_config(residual={"kind": "hc"})."""
    document = {name: {**values, **sections.get(name, {})} for name, values in SMALL.items()}
    document |= {name: values for name, values in sections.items() if name not in document}
    return RunConfig.model_validate(document)


def random_sequences(config: RunConfig, step: int = 0) -> tuple[Tensor, Tensor]:
    """The global batch of a step: tokens and targets, each (all sequences, L) int64."""
    num_sequences = (
        config.parallel.data * config.schedule.num_microbatches * config.data.sequences_per_microbatch
    )
    generator = torch.Generator().manual_seed(1000 + step)
    text = torch.randint(
        config.model.vocab_size, (num_sequences, config.data.sequence_length + 1), generator=generator
    )
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
