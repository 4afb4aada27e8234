"""Arithmetic of one token through the parts of a layer: operations and values moved. No torch.

Element-wise traffic assumes each fused step reads its inputs and writes its outputs once, forward and back.
The loss is counted as torch runs it: logits are the largest values of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig
from mhc_dist.model.count import dense_width


@dataclass(frozen=True, slots=True)
class Work:
    """Per token. `linear`: operations of matrices with weights (each half of the backward repeats them), and
    `crossing`: values of the token that they read and write (each half moves as many). `exact`: operations of
    products in fp32, whatever the run's format. `scores`: operations of attention proper, forward. `values`,
    `values_backward`: values moved by element-wise steps. What is kept: `kept.py`.
    """

    linear: float = 0.0
    crossing: float = 0.0
    exact: float = 0.0
    scores: float = 0.0
    values: float = 0.0
    values_backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.crossing + other.crossing,
            self.exact + other.exact,
            self.scores + other.scores,
            self.values + other.values,
            self.values_backward + other.values_backward,
        )


def product(inputs: int, outputs: int) -> Work:
    """One matrix with weights."""
    return Work(linear=2.0 * inputs * outputs, crossing=float(inputs + outputs))


def attention_work(config: RunConfig) -> Work:
    """Multi-head latent attention: query, latent, key and value, scores, output.

    Scores take one width for queries, keys and values: narrower ones are filled up (`causal_attention`).
    """
    m = config.model
    width, heads = m.hidden_size, m.num_heads
    narrow = m.head_dim + m.rope_dim
    padded = max(narrow, m.value_dim)
    matrices = (
        product(width, heads * narrow)
        + product(width, m.kv_rank + m.rope_dim)
        + product(m.kv_rank, heads * (m.head_dim + m.value_dim))
        + product(heads * m.value_dim, width)
    )
    # Queries, keys and values as they come from their products and as they go to the scores; back to rows.
    turned = heads * (narrow + padded) + heads * (m.head_dim + padded) + m.rope_dim
    turned += heads * (m.value_dim + padded) if m.value_dim < padded else 0
    turned += 2 * heads * m.value_dim
    # The latent is normalised; its gradient and that of the queries meet in their common input.
    moved = Work(values=turned + 2.0 * m.kv_rank, values_backward=turned + 3.0 * m.kv_rank + 3.0 * width)
    return matrices + moved + Work(scores=config.data.sequence_length * heads * 2.0 * padded)


def swiglu_work(width: int, inner: int, rows: int = 1) -> Work:
    """Gate and up in one product, activation, down, for as many rows of a token. Back, the activation reads
    three values and writes two.
    """
    return Work(
        linear=rows * 2.0 * 3 * width * inner,
        crossing=rows * (2.0 * width + 3 * inner),
        values=rows * 3.0 * inner,
        values_backward=rows * 5.0 * inner,
    )


def experts_work(config: RunConfig) -> Work:
    """Routed experts, under balanced routing: as many rows arrive as leave."""
    m = config.model
    # Rows are sorted by expert on arrival and back by sender; so are their gradients.
    sorting = 4.0 * m.num_active_experts * m.hidden_size
    return swiglu_work(m.hidden_size, m.expert_dim, m.num_active_experts) + Work(
        values=sorting, values_backward=sorting
    )


def shared_work(config: RunConfig) -> Work:
    m = config.model
    return swiglu_work(m.hidden_size, m.num_shared_experts * m.expert_dim)


def dense_work(model: ModelConfig) -> Work:
    return swiglu_work(model.hidden_size, dense_width(model))


def routing_work(config: RunConfig) -> Work:
    """Router, in fp32, and the copy of rows in sending order. Back, rows are summed by token, and the
    gradients of all that read the token are added up.
    """
    m = config.model
    copied = float(m.hidden_size + m.num_active_experts * m.hidden_size)
    others = 2 if m.num_shared_experts else 1
    return Work(
        exact=2.0 * m.hidden_size * m.num_experts,
        values=copied,
        values_backward=copied + 3.0 * others * m.hidden_size,
    )


def gathering_work(config: RunConfig) -> Work:
    """Answers weighted and summed per token, and the shared experts' added. Back, answers are read for the
    gradient of their weights, and their own gradients written.
    """
    m = config.model
    rows = float(m.num_active_experts * m.hidden_size)
    added = 3.0 * m.hidden_size if m.num_shared_experts else 0.0
    return Work(values=rows + m.hidden_size + added, values_backward=2 * rows + m.hidden_size)


def head_work(config: RunConfig) -> Work:
    """Output projection and loss over the full vocabulary: logits to fp32, the logarithms of probabilities;
    their gradient (one value a token, the rest zeros), that of the logits, and back to the run's format.
    """
    m = config.model
    value, fp32 = (2, 4) if config.train.precision == "bf16" else (4, 4)
    cast = value + fp32 if value < fp32 else 0
    forward = cast + 2 * fp32
    backward = fp32 + 3 * fp32 + cast
    return product(m.hidden_size, m.vocab_size) + Work(
        values=forward / value * m.vocab_size, values_backward=backward / value * m.vocab_size
    )


def embedding_gradient_bytes(config: RunConfig) -> float:
    """Of a microbatch: torch writes the gradient of all rows, and it is added to the fp32 sum."""
    value = 2 if config.train.precision == "bf16" else 4
    return (2.0 * value + 2 * 4) * config.model.vocab_size * config.model.hidden_size
