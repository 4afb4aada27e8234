"""How many parameters a run's model has: arithmetic on the config, no tensor and no torch.

The router's balancing bias is adjusted, not trained, and is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig, ResidualConfig, ResidualKind
from mhc_dist.model.coefficients import num_projected


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by component, of the whole model. The components add up to `total`."""

    embedding: int
    attention: int
    dense_feed_forward: int
    router: int
    routed_experts: int
    shared_experts: int
    connections: int
    norms: int
    stream_head: int
    output_head: int
    idle_experts: int
    """The part of `routed_experts` that one token does not meet."""

    @property
    def total(self) -> int:
        return sum(self.components().values())

    @property
    def active(self) -> int:
        """What one token is multiplied with: all but the input embedding and the experts it passes by."""
        return self.total - self.embedding - self.idle_experts

    @property
    def vocab(self) -> int:
        """Input embedding and output head: the part that grows with the vocabulary."""
        return self.embedding + self.output_head

    def components(self) -> dict[str, int]:
        """Name to count, in the order a token meets them."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if field.name != "idle_experts"
        }


def count_parameters(config: RunConfig) -> ParameterCount:
    """Exact counts of the model that `config` describes."""
    model, residual = config.model, config.residual
    width = model.hidden_size
    num_sublayers = 2 * model.num_layers
    num_expert_layers = model.num_layers - model.num_dense_layers
    return ParameterCount(
        embedding=model.vocab_size * width,
        attention=model.num_layers * _attention(model),
        dense_feed_forward=model.num_dense_layers * _swiglu(width, dense_width(model)),
        router=num_expert_layers * model.num_experts * width,
        routed_experts=num_expert_layers * model.num_experts * _swiglu(width, model.expert_dim),
        shared_experts=num_expert_layers * _swiglu(width, model.num_shared_experts * model.expert_dim),
        connections=num_sublayers * _connection(residual, width),
        norms=(num_sublayers + 1) * width,
        stream_head=_stream_head(residual, width),
        output_head=model.vocab_size * width,
        idle_experts=num_expert_layers
        * (model.num_experts - model.num_active_experts)
        * _swiglu(width, model.expert_dim),
    )


def dense_width(model: ModelConfig) -> int:
    """FFN width of the leading dense layers. 8 x expert_dim reproduces the paper's published counts."""
    return model.dense_dim if model.dense_dim is not None else 8 * model.expert_dim


def _swiglu(width: int, inner: int) -> int:
    """Gate, up and down."""
    return 3 * width * inner


def _attention(model: ModelConfig) -> int:
    """Multi-head latent attention: query, latent with its norm, key and value from the latent, output."""
    heads, width = model.num_heads, model.hidden_size
    query = width * heads * (model.head_dim + model.rope_dim)
    latent = width * (model.kv_rank + model.rope_dim) + model.kv_rank
    key_value = model.kv_rank * heads * (model.head_dim + model.value_dim)
    output = heads * model.value_dim * width
    return query + latent + key_value + output


def _connection(residual: ResidualConfig, width: int) -> int:
    """One sublayer's phi (or theta), bias and the three alphas."""
    n, num_coefficients = residual.num_streams, num_projected(residual)
    match residual.kind:
        case ResidualKind.RESIDUAL:
            return 0
        case ResidualKind.HC:  # reads each stream by itself: theta is (2 + n, C)
            return (2 + n) * width + num_coefficients + 3
        case _:  # reads all streams at once: phi is (coefficients, nC)
            return num_coefficients * n * width + num_coefficients + 3


def _stream_head(residual: ResidualConfig, width: int) -> int:
    """phi (n, nC), bias n and one scale, where there is a choice to learn."""
    n = residual.num_streams
    return n * n * width + n + 1 if residual.reduce == "learned" and n > 1 else 0


def three_digits(count: int) -> str:
    """As papers print it: 2.97B, 612M, 27.0B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        # 999.6M is 1.00B once it is rounded to three digits.
        if round(count / size, 3) >= 0.9995:
            return f"{count / size:#.3g}".rstrip(".") + unit
    return str(count)
