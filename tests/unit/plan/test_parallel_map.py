"""Simulations side by side. Oracle: the same function, one item after the other."""

import math

import pytest

from mhc_dist.plan.parallel_map import parallel_map


@pytest.mark.parametrize("count", [0, 1, 5])
def test_results_are_those_of_a_loop_and_in_order(count: int) -> None:
    assert parallel_map(math.sqrt, range(count)) == [math.sqrt(number) for number in range(count)]


def test_what_goes_wrong_there_goes_wrong_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|expected a nonnegative"):
        parallel_map(math.sqrt, [1.0, -1.0, 4.0])
