"""Which rank owns which chunk. Chunks are numbered in model order. Standard library only."""

from __future__ import annotations


def v_shape(num_ranks: int) -> tuple[int, ...]:
    """2P chunks: down the ranks and back up, so rank 0 holds both the first and the last chunk."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def round_robin(num_ranks: int, num_chunks_per_rank: int) -> tuple[int, ...]:
    """Chunk c on rank c mod P."""
    return tuple(c % num_ranks for c in range(num_ranks * num_chunks_per_rank))


def mirrored_copies(num_ranks: int) -> tuple[int, ...]:
    """Two copies of P chunks, the second laid out in the opposite direction."""
    return v_shape(num_ranks)
