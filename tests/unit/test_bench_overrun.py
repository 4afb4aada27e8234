"""Oracle: nominal times and events written down by hand."""

from __future__ import annotations

import pytest

from mhc_dist.bench.overrun import Overrun
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.cost import CostTable, PhaseCost
from mhc_dist.pipeline.trace import Event

COSTS = CostTable({(0, "experts.1"): PhaseCost(forward=2.0, input_gradient=4.0, weight_gradient=1.0)}, {})


def event(kind: ActionKind, seconds: float) -> Event:
    return Event(Action(kind, 0, 0, "experts.1"), 10.0, 10.0 + seconds)


def test_share_of_late_time() -> None:
    """Nominal 2 + 5 + 1 seconds; one second late in the backward, a tenth of a second in the forward."""
    events = [
        event(ActionKind.COMPUTE, 2.1),
        event(ActionKind.GRADIENT, 6.0),
        event(ActionKind.WEIGHT, 0.5),
        Event(Action(ActionKind.WAIT, 0, 0, "dispatch.1"), 0.0, 100.0),
    ]
    overrun = Overrun.of(events, COSTS)
    assert overrun.share == pytest.approx(1.1 / 8.0)
    assert overrun.figures() == {"overrun_share": overrun.share, "late_phases_share": pytest.approx(1 / 3)}
    assert (overrun + overrun).share == pytest.approx(overrun.share)
    overrun.check(0.14)
    with pytest.raises(ValueError, match=r"13\.7%, more than 13\.0%.*Raise --slow-motion"):
        overrun.check(0.13)


def test_a_run_without_phases_is_not_late() -> None:
    Overrun().check(0.0)
