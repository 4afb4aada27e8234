"""Which layers each chunk gets: contiguous, balanced by cost. Imports no torch.

The steps of a pipeline wait for its slowest rank. With several chunks per rank, equal chunks can still make
unequal ranks: in a V, the rank that holds the first chunk also holds the last, with the output head. So the
costliest rank is made as cheap as possible, then the costliest chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mhc_dist.config import RunConfig
from mhc_dist.model.flops import head_flops_per_token, layer_flops_per_token
from mhc_dist.pipeline.balance import balance_ranks


def split_layers(
    costs: Sequence[float], num_chunks: int, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[int]:
    """Boundaries b of the split whose largest chunk is smallest, then whose sum of squares is: chunk i holds
    layers b[i] .. b[i+1]-1, every chunk at least one.

    `first_extra` and `last_extra` are the costs of what the first and last chunk hold beside layers.

    Raises:
        ValueError: fewer layers than chunks.
    """
    num_layers = len(costs)
    if num_layers < num_chunks:
        raise ValueError(
            f"model.num_layers={num_layers} is less than the {num_chunks} pipeline chunks: every chunk needs"
            f" a layer. Raise model.num_layers to at least {num_chunks} or lower parallel.pipeline."
        )
    before = [0.0, *accumulate(costs)]

    def chunk_cost(chunk: int, first: int, last: int) -> float:
        extra = (first_extra if chunk == 0 else 0.0) + (last_extra if chunk == num_chunks - 1 else 0.0)
        return before[last] - before[first] + extra

    # best[last] = (largest chunk, sum of squares, boundaries) of the chunks so far, which end at `last`
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for chunk in range(num_chunks):
        left = num_chunks - 1 - chunk
        following: dict[int, tuple[float, float, list[int]]] = {}
        for last in range(chunk + 1, num_layers - left + 1):
            following[last] = min(
                (max(largest, cost), squares + cost * cost, [*bounds, last])
                for first, (largest, squares, bounds) in best.items()
                if first < last
                for cost in [chunk_cost(chunk, first, last)]
            )
        best = following
    return best[num_layers][2]


def partition(config: RunConfig, chunk_rank: Sequence[int]) -> list[int]:
    """Chunk boundaries of a run whose chunk c is on rank `chunk_rank[c]`: `schedule.boundaries`, or balanced.

    Costs are forward operations; the head counts, the embedding look-up not.
    """
    if config.schedule.boundaries != "auto":
        return [0, *config.schedule.boundaries, config.model.num_layers]
    costs = [float(layer_flops_per_token(config, layer)) for layer in range(config.model.num_layers)]
    head = float(head_flops_per_token(config))
    even = split_layers(costs, len(chunk_rank), last_extra=head)
    return balance_ranks(costs, chunk_rank, even, last_extra=head)
