"""Which losses are out of the ordinary."""

from __future__ import annotations

import math
import random

import pytest

from mhc_dist.guard.spikes import FEWEST, SpikeDetector


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level + draw.gauss(0.0, 0.05) for _ in range(count)]


def test_a_jump_is_seen_and_measured() -> None:
    """Oracle: a jump of 20 true deviations; the median is robust to it, so two in a row are both seen."""
    detector = SpikeDetector(window=50, threshold=8.0)
    assert [detector.judge(loss) for loss in noisy(3.0, 60)] == [None] * 60
    for _ in range(2):
        spike = detector.judge(4.0)
        assert spike is not None
        assert spike.median == pytest.approx(3.0, abs=0.03)
        assert spike.deviations == pytest.approx(20.0, rel=0.4)
    assert detector.judge(3.0) is None


def test_falling_loss_is_no_spike() -> None:
    """Oracle: a smooth curve from 6 to 2, as training gives; nothing on it is unusual."""
    detector = SpikeDetector(50, 8.0)
    assert not any(detector.judge(2.0 + 4.0 * math.exp(-step / 30)) for step in range(200))


def test_a_new_level_becomes_the_usual_one() -> None:
    """Oracle: after half a window the median is the new level's."""
    detector = SpikeDetector(20, 8.0)
    for loss in noisy(3.0, 40):
        detector.judge(loss)
    seen = [detector.judge(loss) is not None for loss in noisy(5.0, 40, seed=1)]
    assert all(seen[:8])
    assert not any(seen[12:])


def test_equal_losses_make_no_small_step_a_spike() -> None:
    """Oracle: a deviation of zero would call any difference infinitely large."""
    detector = SpikeDetector(20, 8.0)
    for _ in range(20):
        detector.judge(2.0)
    assert detector.judge(2.01) is None
    assert detector.judge(2.02) is not None


def test_too_few_losses_and_switched_off() -> None:
    """Oracle: no judgement before there is something to compare with; never with a window of 0."""
    detector = SpikeDetector(50, 8.0)
    assert not any(detector.judge(10.0**step) for step in range(FEWEST))
    off = SpikeDetector(0, 8.0)
    assert not any(off.judge(10.0**step) for step in range(100))


def test_a_loss_that_is_not_finite_leaves_no_trace() -> None:
    """Oracle: a detector that never saw it."""
    one, other = SpikeDetector(20, 8.0), SpikeDetector(20, 8.0)
    for loss in noisy(3.0, 30):
        one.judge(loss)
        other.judge(loss)
    assert one.judge(math.nan) is None
    assert one.judge(math.inf) is None
    assert one.judge(4.0) == other.judge(4.0)
