"""Arithmetic of one token through the parts of a layer: operations and bytes moved. No torch.

Rows are counted as in `kernels/README.md`: C is one row of width C in the activation format. Element-wise
traffic assumes each fused step reads its inputs and writes its outputs once.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig
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
