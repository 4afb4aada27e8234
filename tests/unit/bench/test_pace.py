"""Oracle: a clock moved by hand, on which real compute takes no time at all, or a known one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mhc_dist.bench.pace import WAKE_UP_SECONDS, Nominal, sleep_exactly
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.cost import CostTable, PhaseCost

FIRST, SECOND = (0, "first"), (0, "second")


@dataclass
class Clock:
    now: float = 100.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Nominal:
    phases = {FIRST: PhaseCost(1.0, 2.0, 4.0, recompute=0.5), SECOND: PhaseCost(8.0, 16.0, 32.0)}
    return Nominal(CostTable(phases, {}), lambda: clock.now, clock.sleep)


def two_phases(pace: Nominal, x: Tensor) -> Tensor:
    """(2 x) then its square."""
    (x,) = pace.enter(FIRST, (x,))
    (y,) = pace.leave(FIRST, (2 * x,))
    (y,) = pace.enter(SECOND, (y,))
    (z,) = pace.leave(SECOND, (y * y,))
    return z


def test_phases_under_autograd_last_their_time(pace: Nominal, clock: Clock) -> None:
    """Oracle: 1 + 8 seconds forward, (16 + 32) and then (2 + 4) back; the gradient of 4 x^2 is 8 x."""
    x = torch.tensor(3.0, requires_grad=True)
    z = two_phases(pace, x)
    assert clock.slept == [1.0, 8.0]
    z.backward()
    assert clock.slept[2:] == [48.0, 6.0]
    assert x.grad == 24.0


def test_backward_of_a_phase_on_tokens_ends_the_backward(pace: Nominal, clock: Clock) -> None:
    """Oracle: as above; nothing that the first phase reads is differentiable, only its weight is."""
    weight = torch.tensor(3.0, requires_grad=True)
    (token,) = pace.enter(FIRST, (torch.tensor(2),))
    (y,) = pace.leave(FIRST, (token * weight,))
    (y,) = pace.enter(SECOND, (y,))
    (z,) = pace.leave(SECOND, (y * y,))
    z.backward()
    assert clock.slept == [1.0, 8.0, 48.0, 6.0]
    assert weight.grad == 24.0


def test_halves_of_a_backward_last_their_own_time(pace: Nominal, clock: Clock) -> None:
    """Oracle: 16 and 2 seconds for inputs, 32 + 4 for all weights of the chunk."""
    z = two_phases(pace, torch.tensor(3.0, requires_grad=True))
    with pace.only_inputs():
        z.backward()
    assert clock.slept[2:] == [16.0, 2.0]
    with pace.weights(0):
        clock.now += 6.0
    assert clock.slept[4:] == [30.0]


def test_late_compute_is_reported(pace: Nominal, clock: Clock) -> None:
    """Oracle: by hand. 3 seconds for a phase of 1 are 2 seconds late; nobody sleeps."""
    pace.enter(FIRST, ())
    clock.now += 3.0
    pace.leave(FIRST, ())
    assert clock.slept == []
    assert pace.overrun.late_seconds == 2.0
    assert pace.overrun.share == 2.0
    pace.running = False
    pace.enter(FIRST, ())
    pace.leave(FIRST, ())
    assert clock.slept == []
    assert pace.overrun.nominal_seconds == 1.0


@pytest.mark.parametrize(
    ("kind", "defers", "seconds"),
    [
        (ActionKind.COMPUTE, False, 1.0),
        (ActionKind.GRADIENT, False, 6.0),
        (ActionKind.GRADIENT, True, 2.0),
        (ActionKind.WEIGHT, False, 4.0),
        (ActionKind.RECOMPUTE, False, 0.5),
    ],
)
def test_actions_of_a_program_last_as_long(
    kind: ActionKind, defers: bool, seconds: float, pace: Nominal, clock: Clock
) -> None:
    """Oracle: the same table; what the action took itself is part of it."""
    start = clock.now
    clock.now += 0.25
    pace.stretch(Action(kind, 0, 0, "first", defer_weights=defers), start)
    assert clock.slept == [seconds - 0.25]


def test_communication_is_not_paced(pace: Nominal, clock: Clock) -> None:
    """Oracle: there is no entry for it in the table; the link delays it."""
    pace.stretch(Action(ActionKind.WAIT, 0, 0, "dispatch"), clock.now)
    assert clock.slept == []


@pytest.mark.parametrize("seconds", [0.0, WAKE_UP_SECONDS / 2, 10 * WAKE_UP_SECONDS])
def test_a_sleep_never_ends_early(seconds: float) -> None:
    """Oracle: the clock; shorter than a wake-up, and longer. How late it ends is for the machine to say."""
    start = time.perf_counter()
    sleep_exactly(seconds)
    assert time.perf_counter() - start >= seconds
