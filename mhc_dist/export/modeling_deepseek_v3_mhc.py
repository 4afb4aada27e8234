"""DeepSeek-V3 with Manifold-Constrained Hyper-Connections (arXiv:2512.24880), for transformers.

This file travels beside the weights. Load them with

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Attention, experts and router are transformers' DeepSeek-V3. Its residual adds are replaced by n streams of
the hidden state that every sublayer reads a mixture of and writes a mixture to. Names and layout of the
added tensors are DeepSeek-V4's: fn (n^2 + 2n, n * width) gives [pre n | post n | comb n^2], comb[in, out].

Shapes: B sequences, L positions, n streams (N), C hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3Model,
)


@strict
class DeepseekV3MhcConfig(DeepseekV3Config):
    """DeepSeek-V3's, with n streams, Sinkhorn iterations and eps as DeepSeek-V4 names them."""

    model_type = "deepseek_v3_mhc"

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 0.0


# How files store experts (one by one) and how the model holds them (stacked) is DeepSeek-V3's.
register_checkpoint_conversion_mapping(
    "deepseek_v3_mhc", get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)


def normalised(streams_BLNC: Tensor, eps: float) -> Tensor:
    """All streams of a token in one row, divided by their common root mean square; fp32, (B, L, n * C)."""
    flat = streams_BLNC.flatten(2).float()
    return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def collapse(streams_BLNC: Tensor, weight_BLN: Tensor) -> Tensor:
    """Weighted sum over streams, (B, L, C)."""
    return (weight_BLN.unsqueeze(-1) * streams_BLNC).sum(2).to(streams_BLNC.dtype)


class DeepseekV3MhcDecoderLayer(DeepseekV3DecoderLayer):
    """Two sublayers over n streams."""

    def __init__(self, config: DeepseekV3MhcConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        n = config.hc_mult
        self.num_streams, self.iterations = n, config.hc_sinkhorn_iters
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        for part in ("attn", "ffn"):
            self.register_parameter(
                f"hc_{part}_fn", nn.Parameter(torch.empty(n * n + 2 * n, n * config.hidden_size))
            )
            self.register_parameter(f"hc_{part}_base", nn.Parameter(torch.empty(n * n + 2 * n)))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.empty(3)))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if hidden_states.dim() == 3:  # the embedding, before the first layer
            hidden_states = hidden_states.unsqueeze(2).repeat(1, 1, self.num_streams, 1)
        pre, post, comb = self._mixes(hidden_states, "attn")
        h = self.input_layernorm(collapse(hidden_states, pre))
        y, _ = self.self_attn(hidden_states=h, **kwargs)
        hidden_states = self._rejoin(hidden_states, y, post, comb)
        pre, post, comb = self._mixes(hidden_states, "ffn")
        y = self.mlp(self.post_attention_layernorm(collapse(hidden_states, pre)))
        return self._rejoin(hidden_states, y, post, comb)

    def _mixes(self, streams: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
        n, eps = self.num_streams, self.hc_eps
        fn, base, scale = (
            self.get_parameter(f"hc_{part}_{leaf}").float() for leaf in ("fn", "base", "scale")
        )
        mixes = normalised(streams, self.norm_eps) @ fn.t()
        pre = torch.sigmoid(mixes[..., :n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = (mixes[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
        comb = comb.softmax(-1) + eps
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(self.iterations - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        return pre, post, comb

    @staticmethod
    def _rejoin(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """x'[out] = sum_in comb[in, out] x[in] + post[out] y."""
        mixed = torch.einsum("blio,blic->bloc", comb, streams.float())
        return (mixed + post.unsqueeze(-1) * y.float().unsqueeze(2)).to(streams.dtype)


class DeepseekV3MhcModel(DeepseekV3Model):
    config_class = DeepseekV3MhcConfig
    _no_split_modules = ("DeepseekV3MhcDecoderLayer",)

    def __init__(self, config: DeepseekV3MhcConfig) -> None:
        super().__init__(config)
        n = config.hc_mult
        self.layers = nn.ModuleList(
            DeepseekV3MhcDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.hc_head_fn = nn.Parameter(torch.empty(n, n * config.hidden_size))
        self.hc_head_base = nn.Parameter(torch.empty(n))
        self.hc_head_scale = nn.Parameter(torch.empty(1))
        self.norm.register_forward_pre_hook(self._collapse)
        self.post_init()

    def _collapse(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Streams to one hidden state, on the way into the final norm."""
        (streams,) = inputs
        mixes = normalised(streams, self.config.rms_norm_eps) @ self.hc_head_fn.float().t()
        logits = mixes * self.hc_head_scale.float() + self.hc_head_base.float()
        return (collapse(streams, torch.sigmoid(logits) + self.config.hc_eps),)


class DeepseekV3MhcForCausalLM(DeepseekV3ForCausalLM):
    config_class = DeepseekV3MhcConfig

    def __init__(self, config: DeepseekV3MhcConfig) -> None:
        super().__init__(config)
        self.model = DeepseekV3MhcModel(config)
        self.post_init()
