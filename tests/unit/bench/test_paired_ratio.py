"""Oracle: every way in which pairs can fall on either side of the true median, counted."""

from __future__ import annotations

from itertools import product

import pytest

from mhc_dist.bench.peers.ratio import paired_ratio


def coverage_by_counting(count: int, k: int) -> float:
    """Share of equally likely outcomes that have the median between the k-th smallest and k-th largest."""
    outcomes = [sum(below) for below in product((0, 1), repeat=count)]
    return sum(k <= below <= count - k for below in outcomes) / len(outcomes)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 1), (5, 1), (6, 1), (8, 1), (9, 2), (12, 3)])
def test_interval_is_the_shortest_that_covers(count: int, k: int) -> None:
    """Oracle: counting; of fewer than 6 pairs the whole range."""
    found = paired_ratio([float(value) for value in range(1, count + 1)], [1.0] * count)
    assert (found.low, found.high) == (k, count + 1 - k)
    assert found.coverage == pytest.approx(coverage_by_counting(count, k))
    if count >= 6:
        assert found.coverage >= 0.95 > coverage_by_counting(count, k + 1)


def test_ratios_are_of_pairs() -> None:
    """Oracle: two machines, one of which became three times as slow in the middle of the run."""
    found = paired_ratio([2.0, 4.0, 30.0], [1.0, 2.0, 15.0])
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
