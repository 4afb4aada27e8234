"""What a rank holds of one microbatch in one chunk, from its first forward phase to its last weight gradient.

Each phase is an autograd segment of its own. Values enter a segment through `_Entry`, which hands the
gradient out again, so neither inputs nor outputs of a segment are kept alive by this bookkeeping: only what
the layers themselves save for their backward stays in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mhc_dist.pipeline.action import CHUNK_OUTPUT, Pass
from mhc_dist.pipeline.phase import Chunk, Exchange, ExchangeLoad, PendingExchange, Phase
from mhc_dist.pipeline.streams import Streams, Token


class GradientStore:
    """Gradients of named values; several readers of one value add up."""

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        held = self._gradients.get(name)
        self._gradients[name] = gradient if held is None else held + gradient

    def take(self, name: str) -> Tensor | None:
        """The complete gradient, given out once; None when no reader contributed."""
        return self._gradients.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        """Names whose gradient nobody has taken."""
        return iter(self._gradients)


class _Entry(torch.autograd.Function):
    """The start of a segment: passes a value in, and its gradient to the store instead of further back.

    `anchor` is an empty leaf: it makes autograd record the segment although `value` requires no gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, store: GradientStore, name: str) -> Tensor:
        ctx.store, ctx.name = store, name
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        ctx.store.add(ctx.name, gradient)
        return None, None, None, None


class LiveMicrobatch:
    """Values, segments and exchanges in flight of one (chunk, microbatch).

    given: values that no item writes: the chunk's input for chunk 0, the targets for the last chunk.
    Every other value comes with a token: the end of the work that makes it.
    """

    def __init__(
        self, chunk: Chunk, microbatch: int, given: dict[str, Any], streams: Streams, *, training: bool
    ) -> None:
        self.chunk, self.microbatch, self.training = chunk, microbatch, training
        self._streams = streams
        self._tokens: dict[str, Token] = {}
        self.gradients = GradientStore()
        self._values: dict[str, Any] = dict(given)
        self._given = frozenset(given)
        self._readers_left = Counter(name for item in chunk.items for name in item.shape.reads)
        self._segments: dict[str, dict[str, GradientEdge]] = {}
        self._pending: dict[tuple[str, Pass], PendingExchange] = {}
        self._constants: dict[str, tuple[Any, ...]] = {}
        self._keeper = chunk.make_keeper() if training else None
        self._replays: dict[str, list[Any]] = {}
        self._anchor = torch.empty(0, requires_grad=True) if training else None

    # Values

    def put(self, name: str, value: Any, token: Token) -> None:
        """Hold a value for its readers; what nobody reads (sublayer inputs without shared experts) is not
        held, or it would stay until FREE.
        """
        assert name not in self._values, f"{name} written twice"
        if not self._readers_left[name] and name != CHUNK_OUTPUT:
            return
        self._values[name] = value
        self._tokens[name] = token

    def take(self, name: str) -> Any:
        """A value on its way out of the chunk."""
        return self._values.pop(name)

    def _read(self, names: tuple[str, ...]) -> list[Any]:
        values = [self._values[name] for name in names]
        for name in names:
            self._readers_left[name] -= 1
            if not self._readers_left[name]:
                del self._values[name]
        return values

    # Phases

    def compute(self, phase: Phase) -> None:
        """Run a phase forward; in training, record its segment."""
        tokens = [self._tokens[name] for name in phase.shape.reads if name in self._tokens]
        values = self._read(phase.shape.reads)
        if self.training and not (phase.shape.drops and self._keeper is None):
            outputs = self._run_segment(phase, values, tokens)
        else:
            with torch.no_grad(), self._streams.reading(tokens):
                outputs = phase.run(*values)
            if self.training:
                self._replays[phase.shape.name] = values
        token = self._streams.position()
        for name, output in zip(phase.shape.writes, outputs, strict=True):
            self.put(name, output.detach() if isinstance(output, Tensor) else output, token)

    def recompute(self, phase: Phase) -> None:
        """Bring back what the forward of a phase dropped."""
        if self._keeper is not None:
            self._keeper.regenerate(phase.shape)
        else:
            # What its forward waited for, the streams beside compute need not wait for again.
            self._run_segment(phase, self._replays.pop(phase.shape.name), [])

    def _run_segment(self, phase: Phase, values: list[Any], tokens: list[Token]) -> Sequence[Any]:
        """Run a phase under autograd and keep the ends of its graph."""
        drops = phase.shape.drops and self._keeper is not None
        recording = self._keeper.recording(phase.shape) if drops and self._keeper else nullcontext()
        with torch.enable_grad(), recording, self._streams.reading(tokens):
            entries = [
                self._enter(name, value) for name, value in zip(phase.shape.reads, values, strict=True)
            ]
            outputs = phase.run(*entries)
        self._segments[phase.shape.name] = {
            name: get_gradient_edge(output)
            for name, output in zip(phase.shape.writes, outputs, strict=True)
            if isinstance(output, Tensor) and output.requires_grad
        }
        return outputs

    def _enter(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return _Entry.apply(self._anchor, value, self.gradients, name)
        return value

    def gradient(self, phase: Phase, *, defer_weights: bool) -> None:
        """Run a phase backward from the gradients of what it wrote; weight gradients may be put off."""
        edges = self._segments.pop(phase.shape.name)
        taken = [(edge, self.gradients.take(name)) for name, edge in edges.items()]
        known = [(edge, gradient) for edge, gradient in taken if gradient is not None]
        assert known, f"no gradient reaches {phase.shape.name}"
        queue = self.chunk.weight_queue
        if defer_weights:
            queue.open(self.key(phase.shape.name))
        try:
            torch.autograd.backward([edge for edge, _ in known], [gradient for _, gradient in known])
        finally:
            if defer_weights:
                queue.close()
        if phase.shape.drops and self._keeper is not None:
            self._keeper.forget(phase.shape)

    def weight(self, phase: Phase) -> None:
        self.chunk.weight_queue.run(self.key(phase.shape.name))

    def key(self, item: str) -> tuple[int, int, str]:
        return self.chunk.index, self.microbatch, item

    # Exchanges

    def issue(self, exchange: Exchange, direction: Pass) -> int:
        """Start an exchange; returns the bytes that leave this rank."""
        name = exchange.shape.name
        if direction is Pass.FORWARD:
            values = self._read(exchange.shape.reads)
            if self.training and exchange.shape.differentiable:
                self._constants[name] = tuple(values[1:])
            pending = exchange.issue(*values)
        else:
            assert exchange.issue_gradient is not None, f"{name} has no backward"
            (written,) = exchange.shape.writes
            gradient = self.gradients.take(written)
            assert gradient is not None, f"no gradient reaches exchange {name}"
            pending = exchange.issue_gradient(gradient, *self._constants.pop(name))
        self._pending[name, direction] = pending
        return pending.load.sent_bytes

    def wait(self, exchange: Exchange, direction: Pass) -> ExchangeLoad:
        """Complete an exchange; returns what it moved."""
        pending = self._pending.pop((exchange.shape.name, direction))
        result = pending.wait()
        if direction is Pass.FORWARD:
            (written,) = exchange.shape.writes
            self.put(written, result, pending.token)
        else:
            self.gradients.add(exchange.shape.reads[0], result)
        return pending.load

    def check_finished(self) -> None:
        """Nothing may be left when the program frees this microbatch: a leak would grow every step."""
        left = [
            *self._segments,
            *self._replays,
            *(f"{name}.{way}" for name, way in self._pending),
            *self._constants,
            # That of a value from outside goes nowhere.
            *(f"gradient of {name}" for name in self.gradients if name not in self._given),
        ]
        assert not (self.training and left), (
            f"chunk {self.chunk.index} microbatch {self.microbatch}: left {left}"
        )
