"""Tempos: what phases take at the speed that was watched."""

from __future__ import annotations

from random import Random

import pytest

from mhc_dist.pipeline.tempo import Tempo, TempoCursor


def test_phases_take_what_their_work_took() -> None:
    """Oracle: by hand. Work of 1 s at 2 s per second, then of 1 s at 4, then from the start again."""
    cursor = TempoCursor(Tempo(((1.0, 2.0), (1.0, 4.0))))
    assert cursor.seconds(0.5) == 1.0
    assert cursor.seconds(1.0) == 0.5 * 2 + 0.5 * 4
    assert cursor.seconds(0.0) == 0.0
    assert cursor.seconds(1.0) == 0.5 * 4 + 0.5 * 2
    assert cursor.seconds(4.5) == 0.5 * 2 + 4 + 2 + 4 + 2


def test_in_any_order_phases_take_as_long_altogether() -> None:
    """Oracle: the sum of what was watched; the order must not matter to it."""
    random = Random(0)
    pieces = [(random.uniform(1e-4, 0.1), random.lognormvariate(0, 0.5)) for _ in range(500)]
    watched = sum(cost * factor for cost, factor in pieces)
    for _ in range(5):
        cursor = TempoCursor(Tempo(tuple(pieces)))
        costs = random.sample([cost for cost, _ in pieces], len(pieces))
        assert sum(map(cursor.seconds, costs)) == pytest.approx(watched, rel=1e-9)
