"""Nominal time: every phase of compute lasts what a table says, whoever runs it.

More ranks than cores share the processors, so real compute of one rank hides another's waiting. With nominal
times the real compute still takes place (results are real), and then the rank sleeps until the phase's time
is over. The processors must be fast enough to finish first; `Nominal.overrun` says how late they were.

Engines with programs are paced action by action (`Nominal.stretch`); engines that know nothing but autograd
get the same times from inside their graphs (`enter` and `leave` around the layers' phases).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mhc_dist.bench.overrun import Overrun
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.cost import CostTable, PhaseCost
from mhc_dist.pipeline.receives import COMPUTE_KINDS

Key = tuple[int, str]
"""(chunk, phase)"""

Half = Literal["both", "input", "none"]
"""What autograd is asked for: both gradients, those of inputs, or those of weights, which `weights` times."""

LATE = 0.1
"""A phase counts as late when it lasts longer than its time by this share of it."""


WAKE_UP_SECONDS = 3e-4
"""How late a sleep may end: the timer's slack, and a virtual core that has to be woken."""


def sleep_exactly(seconds: float) -> None:
    """Ends on time, for a little work at the end: otherwise each of hundreds of phases would end late."""
    end = time.perf_counter() + seconds
    if seconds > WAKE_UP_SECONDS:
        time.sleep(seconds - WAKE_UP_SECONDS)
    while time.perf_counter() < end:
        pass


class Pace(Protocol):
    """How long phases last that run under autograd."""

    def enter(self, key: Key, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a phase reads, on its way in."""
        ...

    def leave(self, key: Key, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a phase wrote, on its way out."""
        ...


class RealTime:
    """Phases last as long as they take."""

    def enter(self, key: Key, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values

    def leave(self, key: Key, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return outputs


@dataclass
class _Watch:
    """One run of one phase: when its forward, later its backward, began. `has_entry`: something that it
    reads is differentiable, so its backward has an end inside the graph."""

    pace: Nominal
    cost: PhaseCost
    start: float
    has_entry: bool


class Nominal:
    """Phases last as long as `costs` says."""

    def __init__(
        self,
        costs: CostTable,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = sleep_exactly,
    ) -> None:
        self.costs, self._clock, self._sleep = costs, clock, sleep
        self._open: dict[Key, _Watch] = {}
        self._half: Half = "both"
        self.overrun = Overrun()
        self.running = True
        """False: phases last as long as they take."""

    def stretch(self, action: Action, start: float) -> None:
        """Sleep until `action`, begun at `start`, has lasted its time; for `Executor(stretch=...)`."""
        if action.kind in COMPUTE_KINDS:
            self._last(start, self.costs.seconds(action))

    def enter(self, key: Key, values: tuple[Any, ...]) -> tuple[Any, ...]:
        places = _differentiable(values)
        watch = _Watch(self, self.costs.phases[key], self._clock(), bool(places))
        assert key not in self._open, f"{key} runs already"
        self._open[key] = watch
        return _through(_Enter, watch, values, places)

    def leave(self, key: Key, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        watch = self._open.pop(key)
        outputs = _through(_Leave, watch, outputs, _differentiable(outputs))
        self._last(watch.start, watch.cost.forward)
        return outputs

    @contextmanager
    def only_inputs(self) -> Iterator[None]:
        """Backwards inside compute the gradients of inputs, and last that long."""
        self._half = "input"
        try:
            yield
        finally:
            self._half = "both"

    @contextmanager
    def weights(self, chunk: int) -> Iterator[None]:
        """What runs inside are all weight gradients of one microbatch of `chunk`."""
        start, self._half = self._clock(), "none"
        try:
            yield
        finally:
            self._half = "both"
        seconds = sum(cost.weight_gradient for (of, _), cost in self.costs.phases.items() if of == chunk)
        self._last(start, seconds)

    def backward_begins(self, watch: _Watch) -> None:
        watch.start = self._clock()
        if not watch.has_entry:  # the chunk's first phase, on tokens: its backward ends the chunk's
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self.backward_ends(watch))

    def backward_ends(self, watch: _Watch) -> None:
        match self._half:
            case "both":
                self._last(watch.start, watch.cost.input_gradient + watch.cost.weight_gradient)
            case "input":
                self._last(watch.start, watch.cost.input_gradient)
            case "none":
                pass

    def _last(self, start: float, seconds: float) -> None:
        """What began at `start` ends after `seconds`, or now if it is late."""
        if not self.running:
            return
        left = start + seconds - self._clock()
        if left > 0:
            self._sleep(left)
        self.overrun += Overrun(seconds, max(0.0, -left), 1, int(-left > LATE * seconds))


class _Enter(torch.autograd.Function):
    """The border of a phase towards its inputs: in a backward, the last thing to run."""

    @staticmethod
    def forward(ctx: Any, watch: _Watch, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.watch = watch
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        watch: _Watch = ctx.watch
        watch.pace.backward_ends(watch)
        return (None, *gradients)


class _Leave(torch.autograd.Function):
    """The border of a phase towards its outputs: in a backward, the first thing to run."""

    @staticmethod
    def forward(ctx: Any, watch: _Watch, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.watch = watch
        ctx.set_materialize_grads(False)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        watch: _Watch = ctx.watch
        watch.pace.backward_begins(watch)
        return (None, *gradients)


def _differentiable(values: tuple[Any, ...]) -> list[int]:
    return [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]


def _through(
    border: type[torch.autograd.Function], watch: _Watch, values: tuple[Any, ...], places: list[int]
) -> tuple[Any, ...]:
    """`values` with those at `places` passed through `border`."""
    if not places:
        return values
    passed = iter(border.apply(watch, *(values[i] for i in places)))
    return tuple(next(passed) if i in places else value for i, value in enumerate(values))
