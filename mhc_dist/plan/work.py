"""Arithmetic of one token through the parts of a layer: operations, bytes moved, bytes kept. No torch.

Rows are counted as in `kernels/README.md`: C is one row of width C in the activation format. Element-wise
traffic assumes each fused step reads its inputs and writes its outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig, ResidualKind
from mhc_dist.model.count import dense_width


@dataclass(frozen=True, slots=True)
class Work:
    """Per token. `linear`: operations of matrices with weights (each half of the backward repeats them).
    `scores`: operations of attention proper, forward. `values`: values moved by element-wise steps, forward
    (the backward moves twice as many). `kept`, `weight_inputs`, `gradients`: values kept for the backward,
    those of them that weight gradients need, and the gradients that a deferred weight gradient keeps.
    """

    linear: float = 0.0
    scores: float = 0.0
    values: float = 0.0
    kept: float = 0.0
    weight_inputs: float = 0.0
    gradients: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.scores + other.scores,
            self.values + other.values,
            self.kept + other.kept,
            self.weight_inputs + other.weight_inputs,
            self.gradients + other.gradients,
        )


def attention_work(config: RunConfig) -> Work:
    """Multi-head latent attention: query, latent, key and value, scores, output."""
    m = config.model
    width, heads = m.hidden_size, m.num_heads
    query = heads * (m.head_dim + m.rope_dim)
    latent = m.kv_rank + m.rope_dim
    key_value = heads * (m.head_dim + m.value_dim)
    mixed = heads * m.value_dim
    return Work(
        linear=2.0 * (width * (query + latent) + m.kv_rank * key_value + mixed * width),
        scores=config.data.sequence_length * heads * (m.head_dim + m.rope_dim + m.value_dim),
        values=2.0 * (query + latent + key_value) + 2.0 * mixed,
        kept=query + latent + key_value + mixed + heads,
        weight_inputs=m.kv_rank + mixed,
        gradients=query + latent + key_value + width,
    )


def swiglu_work(width: int, inner: int) -> Work:
    """Gate, up, activation, down, for one row; its input is counted where it is made."""
    return Work(
        linear=2.0 * 3 * width * inner,
        values=3.0 * inner,
        kept=3.0 * inner,
        weight_inputs=1.0 * inner,
        gradients=2.0 * inner + width,
    )


def experts_work(config: RunConfig) -> Work:
    """Routed experts, under balanced routing: as many rows arrive as leave."""
    m = config.model
    one = swiglu_work(m.hidden_size, m.expert_dim)
    total = Work()
    for _ in range(m.num_active_experts):
        total += one
    arrived = float(m.num_active_experts * m.hidden_size)
    # Rows are sorted by expert on arrival and back by sender.
    return total + Work(values=4 * arrived, kept=arrived, weight_inputs=arrived)


def shared_work(config: RunConfig) -> Work:
    m = config.model
    return swiglu_work(m.hidden_size, m.num_shared_experts * m.expert_dim)


def dense_work(model: ModelConfig) -> Work:
    return swiglu_work(model.hidden_size, dense_width(model))


def routing_work(config: RunConfig) -> Work:
    """Router and the copy of rows in sending order."""
    m = config.model
    rows = m.num_active_experts * m.hidden_size
    return Work(
        linear=2.0 * m.hidden_size * m.num_experts, values=m.hidden_size + rows, gradients=m.num_experts
    )


def gathering_work(config: RunConfig) -> Work:
    """Answers weighted and summed per token; the answers stay for the gradient of the weights."""
    m = config.model
    rows = float(m.num_active_experts * m.hidden_size)
    return Work(values=rows + 2 * m.hidden_size, kept=rows)


def head_work(config: RunConfig) -> Work:
    """Output projection and loss over the full vocabulary."""
    m = config.model
    return Work(
        linear=2.0 * m.hidden_size * m.vocab_size,
        values=3.0 * m.vocab_size,
        kept=m.vocab_size + m.hidden_size,
        weight_inputs=m.hidden_size,
        gradients=m.vocab_size,
    )


@dataclass(frozen=True, slots=True)
class ConnectionWork:
    """Rows C per token that one sublayer's connection moves and keeps, and operations of its projection.

    kept: what a backward without recomputation needs. A recomputing block keeps `block_start` once and
    `kept_anyway` per sublayer; `recompute` rows are moved to get the rest back.
    """

    enter: float
    cross: float
    leave: float
    enter_backward: float
    cross_backward: float
    leave_backward: float
    recompute: float
    kept: float
    kept_anyway: float
    block_start: float
    projection: float


def connection_work(config: RunConfig) -> ConnectionWork:
    """Seam-fused kernels, two passes over the streams: 3n+2 rows forward, 5n+4 backward, n+2 recompute.

    `enter` and `leave` are the half seams at the ends of a chunk. For the plain residual: one pass that adds
    and normalises.
    """
    n = config.residual.num_streams
    if config.residual.kind is ResidualKind.RESIDUAL:
        return ConnectionWork(2, 4, 3, 4, 5, 3, 0, 2, 2, 0, 0.0)
    coefficients = 2 * n if config.residual.kind is ResidualKind.IDENTITY else 2 * n + n * n
    return ConnectionWork(
        enter=2 * n + 1,
        cross=3 * n + 2,
        leave=2 * n + 1,
        enter_backward=4 * n + 2,
        cross_backward=5 * n + 4,
        leave_backward=3 * n + 2,
        recompute=n + 2,
        kept=n + 3,
        kept_anyway=1,
        block_start=n,
        projection=2.0 * n * config.model.hidden_size * coefficients,
    )
