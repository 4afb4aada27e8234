"""Where to cut the model so that ranks, not only chunks, have equal work. Standard library only.

With several chunks per rank, chunks of equal cost can still make unequal ranks: in a V, the rank that holds
the first chunk also holds the last, with the output head. A step waits for its slowest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def balance_ranks(
    costs: Sequence[float],
    chunk_rank: Sequence[int],
    bounds: Sequence[int],
    first_extra: float = 0.0,
    last_extra: float = 0.0,
) -> list[int]:
    """Improve `bounds` (chunk i holds layers bounds[i] .. bounds[i+1]-1) until no shift helps.

    Minimises the costliest rank, then the costliest chunk, then the sum of squares over chunks. Shifts move
    one boundary, or several neighbouring ones together, by one layer. Deterministic.
    """
    before = [0.0, *accumulate(costs)]
    num_chunks = len(bounds) - 1

    def merit(candidate: Sequence[int]) -> tuple[float, float, float]:
        chunks = [before[candidate[i + 1]] - before[candidate[i]] for i in range(num_chunks)]
        chunks[0] += first_extra
        chunks[-1] += last_extra
        ranks = [0.0] * (max(chunk_rank) + 1)
        for cost, rank in zip(chunks, chunk_rank, strict=True):
            ranks[rank] += cost
        return (max(ranks), max(chunks), sum(cost * cost for cost in chunks))

    best, best_merit = list(bounds), merit(bounds)
    improved = True
    while improved:
        improved = False
        for first in range(1, num_chunks):
            for last in range(first, num_chunks):
                for step in (-1, 1):
                    candidate = [
                        bound + step * (first <= position <= last) for position, bound in enumerate(best)
                    ]
                    if any(candidate[i] >= candidate[i + 1] for i in range(num_chunks)):
                        continue
                    found = merit(candidate)
                    if found < best_merit:
                        best, best_merit, improved = candidate, found, True
    return best
