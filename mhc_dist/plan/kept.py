"""Bytes that a phase of `parallel.chunk` keeps for its backward, and what waits between phases. No torch.

Counted from what the layers save, in bytes per token. `bench memory` holds the counts to the allocator's.
Three kinds of bytes:

* kept: saved by a phase from its forward to its backward; of it, what recomputation drops meanwhile;
* waiting: values that one phase has written and the next has not read, where nobody else saves them;
* gradients on their way back, which wait likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ModelConfig, ResidualKind
from mhc_dist.model.coefficients import num_mixed, num_projected
from mhc_dist.model.count import dense_width
from mhc_dist.pipeline.action import CHUNK_INPUT, CHUNK_OUTPUT, PhaseShape

FP32, INT64 = 4, 8

ROWS = frozenset({"rows", "arrived", "answers", "returned", "shared"})
"""Values that go from one phase to the next and are freed by it, or saved in another form."""


def _kind(name: str) -> str:
    """`streams.3` -> `streams`."""
    return name.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per token. `saved`: all that the backward needs; `droppable`: of those, streams and sublayer
    inputs that recomputation can bring back. `weight_inputs`: what weight gradients need of `saved`;
    `gradients`: the output gradients that a deferred weight gradient keeps beside them.
    """

    saved: float = 0.0
    droppable: float = 0.0
    weight_inputs: float = 0.0
    gradients: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.saved + other.saved,
            self.droppable + other.droppable,
            self.weight_inputs + other.weight_inputs,
            self.gradients + other.gradients,
        )

    def times(self, count: int) -> Kept:
        return Kept(
            count * self.saved, count * self.droppable, count * self.weight_inputs, count * self.gradients
        )


@dataclass(frozen=True, slots=True)
class Seams:
    """How often a phase opens a chain of streams, crosses to the next sublayer, and ends the chain."""

    enters: int
    crosses: int
    leaves: int


@dataclass(frozen=True, slots=True)
class Ends:
    """Whether a chunk begins or ends the model."""

    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """Bytes per token of one phase: the fields of `PhaseCost` that end in `_bytes`."""

    saved: float
    dropped: float
    weight_inputs: float
    weight_gradients: float
    taken: float
    left: float
    gradients_taken: float
    gradients_left: float


class KeptModel:
    """Counts for one run's widths and number format."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._model: ModelConfig = config.model
        self._bf16 = config.train.precision == "bf16"
        self._value = 2 if self._bf16 else 4
        self._row = self._value * config.model.hidden_size
        self._num_streams = config.residual.num_streams

    # Parts of a layer

    def _norm(self, width: int, storage: int) -> float:
        """RMSNorm over `width` of rows that lie in rows of `storage`: input, normalised, output, statistic.

        In bf16 the input is kept as its fp32 copy.
        """
        kept_input = FP32 * width if self._bf16 else FP32 * storage
        return kept_input + FP32 * width + self._value * width + FP32

    def attention(self) -> Kept:
        """From its input (counted where it is made) to its output (counted where it is read)."""
        m, value = self._model, self._value
        padded = max(m.head_dim + m.rope_dim, m.value_dim)
        latent = m.kv_rank + m.rope_dim
        mixed = m.num_heads * m.value_dim
        tables = FP32 * m.rope_dim / self._config.data.sequences_per_microbatch
        scores = 4 * m.num_heads * padded * value + FP32 * m.num_heads
        outputs = m.num_heads * (2 * m.head_dim + m.rope_dim + m.value_dim) + latent + m.hidden_size
        return Kept(
            saved=self._norm(m.kv_rank, latent) + tables + scores + value * mixed,
            weight_inputs=value * (m.kv_rank + mixed),
            gradients=value * outputs,
        )

    def swiglu(self, inner: int) -> Kept:
        """One row: gate and up, silu(gate), their product."""
        return Kept(
            saved=4.0 * self._value * inner,
            weight_inputs=1.0 * self._value * inner,
            gradients=2.0 * self._value * inner + self._row,
        )

    def dense(self) -> Kept:
        return self.swiglu(dense_width(self._model))

    def shared(self) -> Kept:
        return self.swiglu(self._model.num_shared_experts * self._model.expert_dim)

    def experts(self) -> Kept:
        """Under balanced routing as many rows arrive as leave; they are kept sorted by expert."""
        arrived = float(self._model.num_active_experts * self._row)
        per_row = self.swiglu(self._model.expert_dim)
        return per_row.times(self._model.num_active_experts) + Kept(saved=arrived, weight_inputs=arrived)

    def routing(self) -> Kept:
        """Scores, chosen experts and weights, and where rows go and come from. fp32 whatever the run's
        format, so in bf16 the router keeps an fp32 copy of its input.
        """
        m = self._model
        scores = FP32 * (m.num_experts + 2 * m.num_active_experts + 2)
        places = INT64 * 5 * m.num_active_experts
        return Kept(saved=scores + places + (FP32 * m.hidden_size if self._bf16 else 0))

    def gathering(self) -> Kept:
        """The experts' answers, for the gradient of the routing weights."""
        return Kept(saved=float(self._model.num_active_experts * self._row))

    def head(self) -> Kept:
        """Streams to one row, norm, logits: the loss keeps the logarithms of all probabilities."""
        m, n = self._model, self._num_streams
        learned = n > 1 and self._config.residual.reduce == "learned"
        streams = FP32 * (n * m.hidden_size + 4 * n + 1) if learned else 0
        return Kept(
            saved=streams + self._norm(m.hidden_size, m.hidden_size) + FP32 * m.vocab_size,
            weight_inputs=self._row,
            gradients=self._value * m.vocab_size,
        )

    def connections(self, seams: Seams) -> Kept:
        """Streams, sublayer inputs, sublayer outputs and coefficients of a chain of seams."""
        n, row = self._num_streams, self._row
        kind = self._config.residual.kind
        crossings = seams.enters + seams.crosses
        inputs = float(crossings * row)
        if kind is ResidualKind.RESIDUAL:
            # The sums are kept as the norms' inputs, and their outputs are the sublayers' inputs.
            width = self._model.hidden_size
            return Kept(saved=crossings * self._norm(width, width), weight_inputs=inputs)
        outputs = (seams.crosses + seams.leaves) * row
        if kind is ResidualKind.HC:
            # Plain autograd in fp32: the streams, normalised too, and the norm of the collapsed row.
            width = self._model.hidden_size
            streams = crossings * (n * row + FP32 * n * width * (2 if self._bf16 else 1))
            coefficients = crossings * FP32 * 2 * (2 * n + n * n)
            saved = streams + coefficients + crossings * self._norm(width, width) + outputs
            return Kept(saved=saved, weight_inputs=inputs)
        residual = self._config.residual
        coefficients = crossings * FP32 * (num_projected(residual) + num_mixed(residual) + 2)
        # A chain that is opened keeps the streams it was given: they are no phase's to drop.
        droppable = float((seams.crosses * n + crossings) * row)
        return Kept(
            saved=seams.enters * n * row + droppable + outputs + coefficients,
            droppable=droppable,
            weight_inputs=inputs,
        )

    # Phases

    def block_start(self) -> float:
        """Streams at the start of a block, kept so that the rest follows."""
        return float(self._num_streams * self._row)

    def replayed(self, shape: PhaseShape, *, first: bool) -> float:
        """What full recomputation keeps of a phase: the values it reads. first: its input is tokens."""
        return sum(self.value(name) for name in shape.reads if not (first and name == CHUNK_INPUT))

    def kept_anew(self, shape: PhaseShape, *, first: bool) -> float:
        """What of those the phase saves as well, or lets go of, when it runs once more."""
        kinds = ROWS if first else ROWS | {CHUNK_INPUT}
        return sum(self.value(name) for name in shape.reads if _kind(name) in kinds)

    def value(self, name: str) -> float:
        """Bytes per token of a named value."""
        n, active = self._num_streams, self._model.num_active_experts
        match _kind(name):
            case "streams" | "input" | "output":
                return float(n * self._row)
            case "hidden" | "shared":
                return float(self._row)
            case "rows" | "arrived" | "answers" | "returned":
                return float(active * self._row)
            case "post" | "pre":
                return float(FP32 * n)
            case "res":
                return float(FP32 * n * n)
            case "weights":
                return float(FP32 * active)
            case "plan" | "arrival":
                return float(INT64 * 2 * active)
            case _:
                return 0.0

    def waiting(self, names: tuple[str, ...], *, ends: Ends, drops: bool) -> float:
        """Bytes of values between their writer and their reader that neither counts as saved.

        Streams and sublayer inputs are saved by the phase that writes them, unless phases drop them.
        Coefficients and plans count as saved. At the ends of the model there are tokens and the loss instead
        of streams.
        """
        kinds = ROWS | {"streams", "hidden"} if drops else ROWS
        if not ends.first:
            kinds |= {CHUNK_INPUT}
        if not ends.last:
            kinds |= {CHUNK_OUTPUT}
        return sum(self.value(name) for name in names if _kind(name) in kinds)

    def gradients(self, names: tuple[str, ...], ends: Ends) -> float:
        """Gradients of values on their way back."""
        return self.waiting(names, ends=ends, drops=True)


def phase_bytes(
    model: KeptModel, shape: PhaseShape, seams: Seams, parts: Kept, *, everything: bool, ends: Ends
) -> PhaseBytes:
    """Bytes per token of a phase that consists of `seams` and `parts`, in a chunk with these `ends`.

    everything: what drops does so wholly and keeps its inputs alone.
    """
    kept = parts + model.connections(seams)
    saved, dropped = kept.saved, 0.0
    if shape.drops and everything:
        anew = model.kept_anew(shape, first=ends.first)
        saved, dropped = model.replayed(shape, first=ends.first), saved - anew
    elif shape.drops:
        dropped = kept.droppable
        saved -= dropped
        if not (shape.recompute_after or seams.enters):
            saved += model.block_start()
    return PhaseBytes(
        saved=saved,
        dropped=dropped,
        weight_inputs=min(kept.weight_inputs, saved + dropped),
        weight_gradients=kept.gradients,
        taken=model.waiting(shape.reads, ends=ends, drops=shape.drops),
        left=model.waiting(shape.writes, ends=ends, drops=shape.drops),
        gradients_taken=model.gradients(shape.writes, ends),
        gradients_left=model.gradients(shape.reads, ends),
    )
