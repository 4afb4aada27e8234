"""A chunk of the model under ordinary autograd, which is how other engines want their stages.

The same layers, the same weights and the same exchanges as in `parallel/chunk.py`; only who runs them
differs. An exchange is an autograd function with an all-to-all in its forward and in its backward.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_dist.bench.pace import Pace
from mhc_dist.config import RunConfig
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import Head
from mhc_dist.parallel.chunk import ModelChunk
from mhc_dist.pipeline.action import CHUNK_INPUT, CHUNK_OUTPUT
from mhc_dist.pipeline.phase import Exchange, PendingExchange, Phase

FINISH = "finish"


@dataclass
class _Flight:
    """One exchange of one microbatch: what its two ends share."""

    exchange: Exchange
    constants: tuple[Any, ...]
    pending: PendingExchange | None = None

    def land(self) -> Tensor:
        assert self.pending is not None
        pending, self.pending = self.pending, None
        result: Tensor = pending.wait()
        return result


class _Start(torch.autograd.Function):
    """Starts an exchange. Its output is empty and only carries the edge to `_Land`; backward: the mirror."""

    @staticmethod
    def forward(ctx: Any, payload: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.pending = flight.exchange.issue(payload, *flight.constants)
        return payload.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Land(torch.autograd.Function):
    """Waits for what `_Start` has started; backward: starts the gradient's way back."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        flight: _Flight = ctx.flight
        assert flight.exchange.issue_gradient is not None
        flight.pending = flight.exchange.issue_gradient(gradient, *flight.constants)
        return gradient.new_empty(0), None


class DifferentiableChunk(nn.Module):
    """tokens (B, L) or streams (T, n, C) -> streams (T, n, C); with `head`, `loss` turns those into the loss.

    hide_shared: the dispatch of rows flies while the shared experts compute, forward and backward. That is
    as much overlap as a layer can have by itself; without it every exchange is waited for at once.
    """

    def __init__(self, chunk: ModelChunk, head: Head | None, pace: Pace, *, hide_shared: bool) -> None:
        super().__init__()
        self.chunk, self.head = chunk, head
        self._pace, self._hide_shared = pace, hide_shared
        self._readers = Counter(name for item in chunk.items for name in item.shape.reads)

    def initialize(self, config: RunConfig) -> None:
        """Fill the weights from the run's seed."""
        initialize(self.chunk, config)
        if self.head is not None:
            initialize(self.head, config, "head")

    def forward(self, value: Tensor) -> Tensor:
        values: dict[str, Any] = {CHUNK_INPUT: value}
        flying: dict[str, tuple[_Flight, Tensor]] = {}
        left = self._readers.copy()
        for item in self.chunk.items:
            for name in item.shape.reads:
                if name in flying:
                    flight, edge = flying.pop(name)
                    values[name] = _Land.apply(edge, flight)
            reads = [values[name] for name in item.shape.reads]
            left.subtract(item.shape.reads)
            for name in item.shape.reads:
                if not left[name]:
                    values.pop(name, None)
            if isinstance(item, Phase):
                outputs = self._compute(item, reads)
                values |= zip(item.shape.writes, outputs, strict=True)
                continue
            (written,) = item.shape.writes
            if not item.shape.differentiable:
                values[written] = item.issue(*reads).wait()
                continue
            flight = _Flight(item, tuple(reads[1:]))
            edge = _Start.apply(reads[0], flight)
            if self._hide_shared:
                flying[written] = (flight, edge)
            else:
                values[written] = _Land.apply(edge, flight)
        return _own(values[CHUNK_OUTPUT])

    def loss(self, streams_TNC: Tensor, targets_BL: Tensor) -> Tensor:
        """The end of the last chunk's last phase, which engines call by themselves, right after forward."""
        assert self.head is not None
        loss = self.head(streams_TNC, targets_BL)
        return _own(self._pace.leave((self.chunk.index, FINISH), (loss,))[0])

    def _compute(self, phase: Phase, reads: list[Any]) -> tuple[Any, ...]:
        key = (self.chunk.index, phase.shape.name)
        outputs = tuple(phase.run(*self._pace.enter(key, tuple(reads))))
        if self.head is not None and phase.shape.name == FINISH:
            return outputs
        return self._pace.leave(key, outputs)


def _own(output: Tensor) -> Tensor:
    """Never a view: torch's engine detaches outputs in place, which views refuse."""
    return output.clone() if output._is_view() else output
