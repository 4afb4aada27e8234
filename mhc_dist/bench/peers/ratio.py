"""Ratios of times that were taken in turn. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

COVERAGE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, and an interval around it that holds the true median with `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """How many times as long as `denominators` `numerators` are, pair by pair.

    The interval needs no distribution: the true median lies between the k-th smallest and the k-th largest of
    N with probability 1 - 2 sum_{i<k} C(N, i) / 2^N. Of the intervals that reach 95% the shortest; of fewer
    than 6 pairs none does, and the whole range is taken.
    """
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    count = len(ratios)
    k = max((k for k in range(1, count // 2 + 1) if _coverage(count, k) >= COVERAGE), default=1)
    return Ratio(median(ratios), ratios[k - 1], ratios[-k], _coverage(count, k))


def _coverage(count: int, k: int) -> float:
    return 1.0 - 2.0 * sum(comb(count, i) for i in range(k)) / 2.0**count
