"""Two steps compared by their typical times: the median of every action over rounds, added up.

Something else on the machine makes single actions late, other ones in every round. A whole step therefore is
hardly ever undisturbed, while half of the times of each action are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
"""Seconds of (R rounds, A actions)."""

RESAMPLES, AT_ONCE = 1000, 50
PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class TypicalRatio:
    """Ratio of typical steps, and an interval around it that holds it with 95 %."""

    ratio: float
    low: float
    high: float


def typical_actions(rounds_RA: Times) -> Times:
    """Seconds of each action, (A,)."""
    return np.asarray(np.median(rounds_RA, axis=0), dtype=np.float64)


def typical_ratio(
    numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]
) -> TypicalRatio:
    """How many times as long as the `denominators`' step the `numerators`' is; both by round and action, in
    rounds that they took turns in. The interval: rounds drawn anew a thousand times, the same ones for both.
    """
    over_RA, under_RA = np.array(numerators), np.array(denominators)
    num_rounds = len(over_RA)
    assert num_rounds == len(under_RA) > 0, f"{num_rounds} rounds against {len(under_RA)}"
    random = np.random.default_rng(0)
    drawn: list[float] = []
    for _ in range(RESAMPLES // AT_ONCE):
        chosen_DR = random.integers(0, num_rounds, (AT_ONCE, num_rounds))
        over_D, under_D = (np.median(table[chosen_DR], axis=1).sum(-1) for table in (over_RA, under_RA))
        drawn += (over_D / under_D).tolist()
    low, high = (float(end) for end in np.percentile(drawn, PERCENTILES))
    ratio = typical_actions(over_RA).sum() / typical_actions(under_RA).sum()
    return TypicalRatio(float(ratio), low, high)
