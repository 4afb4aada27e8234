"""Arithmetic of one token through the parts of a layer: operations and bytes moved. No torch.

Rows are counted as in `kernels/README.md`: C is one row of width C in the activation format. Element-wise
traffic assumes each fused step reads its inputs and writes its outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig, ResidualKind
from mhc_dist.model.coefficients import num_projected
from mhc_dist.model.count import dense_width


@dataclass(frozen=True, slots=True)
class Work:
    """Per token. `linear`: operations of matrices with weights (each half of the backward repeats them).
    `scores`: operations of attention proper, forward. `values`: values moved by element-wise steps, forward
    (the backward moves twice as many). What is kept: `kept.py`.
    """

    linear: float = 0.0
    scores: float = 0.0
    values: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.scores + other.scores,
            self.values + other.values,
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
    )


def swiglu_work(width: int, inner: int) -> Work:
    """Gate, up, activation, down, for one row."""
    return Work(linear=2.0 * 3 * width * inner, values=3.0 * inner)


def experts_work(config: RunConfig) -> Work:
    """Routed experts, under balanced routing: as many rows arrive as leave."""
    m = config.model
    one = swiglu_work(m.hidden_size, m.expert_dim)
    total = Work()
    for _ in range(m.num_active_experts):
        total += one
    arrived = float(m.num_active_experts * m.hidden_size)
    # Rows are sorted by expert on arrival and back by sender.
    return total + Work(values=4 * arrived)


def shared_work(config: RunConfig) -> Work:
    m = config.model
    return swiglu_work(m.hidden_size, m.num_shared_experts * m.expert_dim)


def dense_work(model: ModelConfig) -> Work:
    return swiglu_work(model.hidden_size, dense_width(model))


def routing_work(config: RunConfig) -> Work:
    """Router and the copy of rows in sending order."""
    m = config.model
    rows = m.num_active_experts * m.hidden_size
    return Work(linear=2.0 * m.hidden_size * m.num_experts, values=m.hidden_size + rows)


def gathering_work(config: RunConfig) -> Work:
    """Answers weighted and summed per token."""
    m = config.model
    rows = float(m.num_active_experts * m.hidden_size)
    return Work(values=rows + 2 * m.hidden_size)


def head_work(config: RunConfig) -> Work:
    """Output projection and loss over the full vocabulary."""
    m = config.model
    return Work(
        linear=2.0 * m.hidden_size * m.vocab_size,
        values=3.0 * m.vocab_size,
    )


@dataclass(frozen=True, slots=True)
class ConnectionWork:
    """Rows C per token that one sublayer's connection moves, and operations of its projection.

    recompute: rows moved to bring back what a recomputing block dropped.
    """

    enter: float
    cross: float
    leave: float
    enter_backward: float
    cross_backward: float
    leave_backward: float
    recompute: float
    projection: float


def connection_work(config: RunConfig) -> ConnectionWork:
    """Seam-fused kernels, two passes over the streams: 3n+2 rows forward, 5n+4 backward, n+2 recompute.

    `enter` and `leave` are the half seams at the ends of a chunk. For the plain residual: one pass that adds
    and normalises.
    """
    n = config.residual.num_streams
    if config.residual.kind is ResidualKind.RESIDUAL:
        return ConnectionWork(2, 4, 3, 4, 5, 3, 0, 0.0)
    coefficients = num_projected(config.residual)
    return ConnectionWork(
        enter=2 * n + 1,
        cross=3 * n + 2,
        leave=2 * n + 1,
        enter_backward=4 * n + 2,
        cross_backward=5 * n + 4,
        leave_backward=3 * n + 2,
        recompute=n + 2,
        projection=2.0 * n * config.model.hidden_size * coefficients,
    )


def unfused_connection_work(config: RunConfig) -> ConnectionWork:
    """The same operation by operation: 5n+1 rows read and 3n+1 written forward (mHC paper, table 2). The
    backward is taken as twice that, as for other element-wise steps; recompute repeats the sum over streams
    and the norm.
    """
    n = config.residual.num_streams
    fused = connection_work(config)
    if config.residual.kind is ResidualKind.RESIDUAL:
        return fused
    forward = (5 * n + 1) + (3 * n + 1)
    return replace(
        fused,
        enter=forward / 2,
        cross=forward,
        leave=forward / 2,
        enter_backward=forward,
        cross_backward=2 * forward,
        leave_backward=forward,
        recompute=3 * n + 2,
    )
