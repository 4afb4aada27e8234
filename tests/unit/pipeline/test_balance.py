"""Boundaries balanced by rank, against brute force over all cuts of small models."""

from __future__ import annotations

from itertools import combinations

import pytest

from mhc_dist.pipeline.balance import balance_ranks


def slowest_rank(costs: list[float], chunk_rank: tuple[int, ...], bounds: list[int], extra: float) -> float:
    ranks = [0.0] * (max(chunk_rank) + 1)
    for chunk, rank in enumerate(chunk_rank):
        ranks[rank] += sum(costs[bounds[chunk] : bounds[chunk + 1]])
    ranks[chunk_rank[-1]] += extra
    return max(ranks)


@pytest.mark.parametrize("extra", [0.0, 1.0, 2.3])
@pytest.mark.parametrize("num_layers", [6, 8, 11, 14])
@pytest.mark.parametrize("chunk_rank", [(0, 1), (0, 1, 1, 0), (0, 1, 2, 2, 1, 0), (0, 1, 2, 0, 1, 2)])
def test_finds_the_best_slowest_rank(chunk_rank: tuple[int, ...], num_layers: int, extra: float) -> None:
    """Oracle: all ways to cut the layers."""
    costs = [1.2, *[1.0] * (num_layers - 1)]
    num_chunks = len(chunk_rank)
    even = [round(i * num_layers / num_chunks) for i in range(num_chunks + 1)]
    found = balance_ranks(costs, chunk_rank, even, last_extra=extra)
    assert found[0] == 0
    assert found[-1] == num_layers
    assert found == sorted(set(found))
    best = min(
        slowest_rank(costs, chunk_rank, [0, *cut, num_layers], extra)
        for cut in combinations(range(1, num_layers), num_chunks - 1)
    )
    assert slowest_rank(costs, chunk_rank, found, extra) == pytest.approx(best)
