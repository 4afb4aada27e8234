"""Floating-point operations of the forward pass, from the configuration alone. Imports no torch.

A multiply-add counts as two. The backward takes twice the forward: once for inputs, once for weights.
"""

from __future__ import annotations

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.model.coefficients import num_projected


def attention_flops_per_token(config: RunConfig) -> int:
    """Latent attention: four projections and causal scores (on average half the sequence is visible)."""
    m = config.model
    query = m.hidden_size * m.num_heads * (m.head_dim + m.rope_dim)
    latent = m.hidden_size * (m.kv_rank + m.rope_dim)
    key_value = m.kv_rank * m.num_heads * (m.head_dim + m.value_dim)
    output = m.num_heads * m.value_dim * m.hidden_size
    scores = config.data.sequence_length * m.num_heads * (m.head_dim + m.rope_dim + m.value_dim) // 2
    return 2 * (query + latent + key_value + output + scores)


def feed_forward_flops_per_token(config: RunConfig, layer: int) -> int:
    """Three SwiGLU matrices: the dense width, or active plus shared experts and the router."""
    m = config.model
    if layer < m.num_dense_layers:
        return 2 * 3 * m.hidden_size * (m.dense_dim if m.dense_dim is not None else 8 * m.expert_dim)
    experts = m.num_active_experts + m.num_shared_experts
    return 2 * (3 * m.hidden_size * m.expert_dim * experts + m.hidden_size * m.num_experts)


def connection_flops_per_token(config: RunConfig) -> int:
    """One sublayer's hyper-connection: projection, collapse, mix and post (mHC paper, eq. 7-9)."""
    if config.residual.kind is ResidualKind.RESIDUAL:
        return config.model.hidden_size
    n, width = config.residual.num_streams, config.model.hidden_size
    return 2 * width * (n * num_projected(config.residual) + n + n * n + n)


def layer_flops_per_token(config: RunConfig, layer: int) -> int:
    """Forward operations of layer `layer` for one token."""
    return (
        attention_flops_per_token(config)
        + feed_forward_flops_per_token(config, layer)
        + 2 * connection_flops_per_token(config)
    )


def head_flops_per_token(config: RunConfig) -> int:
    """The output projection."""
    return 2 * config.model.hidden_size * config.model.vocab_size


def model_flops_per_token(config: RunConfig) -> int:
    """Forward and backward of the whole model for one token."""
    layers = sum(layer_flops_per_token(config, layer) for layer in range(config.model.num_layers))
    return 3 * (layers + head_flops_per_token(config))
