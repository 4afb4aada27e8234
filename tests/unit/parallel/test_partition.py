"""Oracle: all possible splits, tried one by one."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhc_dist.parallel.layout import chunk_places
from mhc_dist.parallel.partition import split_layers
from tests.small import small_config


def all_splits(num_layers: int, num_chunks: int) -> list[list[int]]:
    return [[0, *cuts, num_layers] for cuts in combinations(range(1, num_layers), num_chunks - 1)]


def chunk_costs(costs: list[float], bounds: list[int], last_extra: float) -> list[float]:
    sums = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    sums[-1] += last_extra
    return sums


@given(
    costs=st.lists(st.integers(1, 20).map(float), min_size=1, max_size=9),
    num_chunks=st.integers(1, 9),
    last_extra=st.integers(0, 30).map(float),
)
def test_split_is_the_best_of_all(costs: list[float], num_chunks: int, last_extra: float) -> None:
    if num_chunks > len(costs):
        with pytest.raises(ValueError, match=f"num_layers={len(costs)} is less than the {num_chunks}"):
            split_layers(costs, num_chunks)
        return
    bounds = split_layers(costs, num_chunks, last_extra=last_extra)
    assert bounds in all_splits(len(costs), num_chunks)
    best = min(max(chunk_costs(costs, b, last_extra)) for b in all_splits(len(costs), num_chunks))
    assert max(chunk_costs(costs, bounds, last_extra)) == best


def test_uneven_layers_are_spread() -> None:
    """Oracle: nine equal layers over four chunks leave no chunk with more than three or fewer than two."""
    bounds = split_layers([1.0] * 9, 4)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert sorted(sizes) == [2, 2, 2, 3]


def test_a_heavy_head_takes_layers_from_the_last_chunk() -> None:
    """Oracle: a vocabulary that costs as much as several layers leaves the last chunk the fewest layers."""
    config = small_config(model={"vocab_size": 2000})
    places = chunk_places(config, (0, 1, 2, 3))
    sizes = [place.last_layer - place.first_layer for place in places]
    assert sum(sizes) == 8
    assert sizes[-1] == min(sizes) < max(sizes)
    assert [p.is_first for p in places] == [True, False, False, False]
    assert [p.is_last for p in places] == [False, False, False, True]
