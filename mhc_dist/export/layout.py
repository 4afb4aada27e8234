"""Which tensor of ours is which of Hugging Face's DeepSeek layout, and how to get from one to the other.

The layout is that of `DeepseekV3ForCausalLM`. What hyper-connections add has the names of DeepSeek-V4's
released weights (`hc_attn_fn`, `hc_ffn_base`, `hc_head_scale`, ...; transformers renames them on loading to
`attn_hc.fn`, `ffn_hc.base`, `hc_head.hc_scale`), in the place where the V3 layout has a layer's tensors.

Two things differ beyond names:

* V4 mixes streams with comb[in, out] where we have H_res[out, in] (mHC paper, eq. 3). The n^2 rows of phi
  and bias that produce it are reordered.
* `kv_a_layernorm` of transformers has eps 1e-6, whatever the config says, while ours has `norm_eps`. A norm
  does not see a factor on its input, so the latent's rows are written multiplied with a power of two that
  makes 1e-6 weigh as much as `norm_eps`: see `latent_scale`. Exact in fp32 and bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind

LATENT_NORM_EPS = 1e-6
"""Of transformers' `kv_a_layernorm`, in the statistic of the latent."""

LARGEST_LATENT_SCALE = 1024.0
"""Scaled weights stay far from the end of fp16 (65504); 1e-6 / 1024^2 is below fp32's resolution."""


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the tensors of theirs that hold the same numbers, by full name."""

    ours: str
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensor], Sequence[Tensor]]
    to_ours: Callable[[Sequence[Tensor]], Tensor]
    keep_fp32: bool = False
    """Stays in fp32 when the other weights are written in bf16, as in DeepSeek's own releases."""


def latent_scale(norm_eps: float) -> float:
    """The power of two nearest to sqrt(1e-6 / norm_eps), at most 1024."""
    return min(LARGEST_LATENT_SCALE, 2.0 ** round(math.log2(LATENT_NORM_EPS / norm_eps) / 2))


def entries(config: RunConfig, scale: float) -> Iterator[Entry]:
    """All tensors of a `residual` or `mhc` model, in the order a token meets them.

    scale: what the latent's rows are multiplied with in their files.
    """
    yield _same("embedding.weight", "model.embed_tokens.weight")
    for layer in range(config.model.num_layers):
        yield from _layer(config, layer, scale)
    if config.residual.kind is ResidualKind.MHC:
        for ours, theirs in (("phi_ND", "fn"), ("bias_N", "base"), ("scale_1", "scale")):
            yield _same(f"head.streams.{ours}", f"model.hc_head_{theirs}", keep_fp32=True)
    yield _same("head.streams.norm.gain", "model.norm.weight")
    yield _same("head.output.weight", "lm_head.weight")


def absent_tensors(config: RunConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes, without elements, of what transformers insists on and a model lacks."""
    model = config.model
    if model.num_shared_experts:
        return
    for layer in range(model.num_dense_layers, model.num_layers):
        prefix = f"model.layers.{layer}.mlp.shared_experts"
        yield f"{prefix}.gate_proj.weight", (0, model.hidden_size)
        yield f"{prefix}.up_proj.weight", (0, model.hidden_size)
        yield f"{prefix}.down_proj.weight", (model.hidden_size, 0)


def _layer(config: RunConfig, layer: int, scale: float) -> Iterator[Entry]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    yield from _connection(config, f"{ours}.attention_connection", theirs, "attn", "input_layernorm")
    for mine, yours in (
        ("query.weight", "q_proj.weight"),
        ("latent_norm.gain", "kv_a_layernorm.weight"),
        ("key_value.weight", "kv_b_proj.weight"),
        ("output.weight", "o_proj.weight"),
    ):
        yield _same(f"{ours}.attention.{mine}", f"{theirs}.self_attn.{yours}")
    yield _latent(
        f"{ours}.attention.latent.weight",
        f"{theirs}.self_attn.kv_a_proj_with_mqa.weight",
        config.model.kv_rank,
        scale,
    )
    yield from _connection(
        config, f"{ours}.feed_forward_connection", theirs, "ffn", "post_attention_layernorm"
    )
    ours, theirs = f"{ours}.feed_forward", f"{theirs}.mlp"
    if layer < config.model.num_dense_layers:
        yield from _swiglu(ours, theirs)
        return
    yield _same(f"{ours}.router.weight", f"{theirs}.gate.weight", keep_fp32=True)
    yield _same(f"{ours}.router.bias_E", f"{theirs}.gate.e_score_correction_bias", keep_fp32=True)
    for expert in range(config.model.num_experts):
        yield from _swiglu(f"{ours}.experts.{expert}", f"{theirs}.experts.{expert}")
    if config.model.num_shared_experts:
        yield from _swiglu(f"{ours}.shared", f"{theirs}.shared_experts")


def _connection(config: RunConfig, ours: str, theirs: str, part: str, norm: str) -> Iterator[Entry]:
    if config.residual.kind is ResidualKind.RESIDUAL:
        yield _same(f"{ours}.norm.gain", f"{theirs}.{norm}.weight")
        return
    n = config.residual.num_streams
    yield _transposed(f"{ours}.phi_MD", f"{theirs}.hc_{part}_fn", n)
    yield _transposed(f"{ours}.bias_M", f"{theirs}.hc_{part}_base", n)
    yield _same(f"{ours}.alpha_3", f"{theirs}.hc_{part}_scale", keep_fp32=True)
    yield _same(f"{ours}.norm_gain", f"{theirs}.{norm}.weight")


def _swiglu(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(
        f"{ours}.gate_up.weight",
        (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),
        to_theirs=lambda gate_up: gate_up.chunk(2),
        to_ours=lambda halves: torch.cat(list(halves)),
    )
    yield _same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")


def _same(ours: str, theirs: str, *, keep_fp32: bool = False) -> Entry:
    return Entry(ours, (theirs,), lambda tensor: (tensor,), lambda tensors: tensors[0], keep_fp32)


def _latent(ours: str, theirs: str, kv_rank: int, scale: float) -> Entry:
    def multiply(tensor: Tensor, factor: float) -> Tensor:
        return torch.cat((tensor[:kv_rank] * factor, tensor[kv_rank:]))

    return Entry(
        ours,
        (theirs,),
        to_theirs=lambda tensor: (multiply(tensor, scale),),
        to_ours=lambda tensors: multiply(tensors[0], 1 / scale),
    )


def _transposed(ours: str, theirs: str, n: int) -> Entry:
    """Rows [pre n | post n | res n^2]: row (out, in) of ours is row (in, out) of theirs."""

    def swap(tensor: Tensor) -> Tensor:
        res = tensor[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
        return torch.cat((tensor[: 2 * n], res))

    return Entry(ours, (theirs,), lambda tensor: (swap(tensor),), lambda tensors: swap(tensors[0]), True)
