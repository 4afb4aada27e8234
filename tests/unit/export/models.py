"""Small models with every parameter off its initial value, for tests of export."""

from __future__ import annotations

from typing import Any

import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from tests.small import small_config

RESIDUAL = {"kind": "residual", "num_streams": 1}
MHC = {"kind": "mhc", "num_streams": 4, "sinkhorn_eps": 0.0, "pre_eps": 0.0}
V4 = {"kind": "mhc", "num_streams": 4, "sinkhorn_eps": 1e-6, "pre_eps": 1e-6, "sinkhorn_iterations": 6}


def export_config(residual: dict[str, Any], **model: Any) -> RunConfig:
    """Bytes as vocabulary, the paper's eps, a gate scale that is not 1."""
    sizes = {"num_layers": 3, "vocab_size": 256, "norm_eps": 1e-20, "gate_scale": 1.7}
    return small_config(residual=residual, model={**sizes, **model})


def trained_model(config: RunConfig) -> LanguageModel:
    """As if trained: gains, biases and router biases are random too."""
    model = LanguageModel(config, make_backend("reference"))
    initialize(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                scale = 0.1 if name.endswith("router.bias_E") else 0.3
                tensor += scale * torch.randn(tensor.shape, generator=generator)
    return model.requires_grad_(False)


def tokens(num_sequences: int = 2, length: int = 12) -> Tensor:
    return torch.randint(256, (num_sequences, length), generator=torch.Generator().manual_seed(3))


def logits(model: LanguageModel, tokens_BL: Tensor) -> Tensor:
    """(B, L, V)."""
    return model.head.logits(model.streams(tokens_BL)).unflatten(0, tuple(tokens_BL.shape))
