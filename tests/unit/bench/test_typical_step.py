"""Typical steps: oracles by construction, with actions that something else makes late."""

from __future__ import annotations

import numpy as np
import pytest

from mhc_dist.bench.typical_step import typical_actions, typical_ratio


def test_late_actions_do_not_reach_the_ratio() -> None:
    """Oracle: by construction. 20 actions of 1 s and of 1.05 s; in every round five of each are late by up to
    3 s, so that no step is undisturbed, and a ratio of whole steps is off by a tenth.
    """
    random = np.random.default_rng(1)

    def rounds(seconds: float) -> list[list[float]]:
        table = np.full((40, 20), seconds)
        for actions in table:
            actions[random.choice(20, 5, replace=False)] += random.uniform(0, 3, 5)
        return [list(actions) for actions in table]

    ours, base = rounds(1.05), rounds(1.0)
    whole = [sum(a) / sum(b) for a, b in zip(ours, base, strict=True)]
    assert max(abs(ratio - 1.05) for ratio in whole) > 0.1
    found = typical_ratio(ours, base)
    assert found.ratio == pytest.approx(1.05, abs=1e-9)
    assert found.low <= 1.05 <= found.high


def test_intervals_hold_the_true_ratio() -> None:
    """Oracle: the interval's promise, 95 %, over a hundred runs of noise that is no spikes: at least 85 %
    here, as medians of few rounds are not smooth.
    """
    random = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        ours, base = (mean * random.lognormal(0.0, 0.05, (20, 6)) for mean in (1.1, 1.0))
        found = typical_ratio(ours.tolist(), base.tolist())
        held += found.low <= 1.1 <= found.high
    assert held >= 85


def test_the_median_of_each_action() -> None:
    """Oracle: by hand."""
    assert typical_actions(np.array([[1.0, 9.0], [2.0, 1.0], [9.0, 2.0]])).tolist() == [2.0, 2.0]
