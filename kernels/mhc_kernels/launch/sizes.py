"""How the work of a launch is cut: chunks of tokens, splits of tokens and of channels, padded widths.

Standard library only: who plans a run asks the same questions.
"""

from __future__ import annotations

from typing import NamedTuple

from mhc_kernels.spec import ConnectionSpec
from mhc_kernels.tiles import CHUNK_MULTIPLE, Tile, TileSet, power_of_two_at_least

PROGRAMS_WANTED = 528
"""Programs that backward_apply aims for: four per multiprocessor of the largest supported devices."""
SMALLEST_TOKEN_SPLIT = 256
"""Below this many tokens per split, the partial dphi would outweigh what the split reads."""


class TokenSplits(NamedTuple):
    """Partial sums over tokens: of dphi and of dgain."""

    phi: int
    gain: int


def ceil_divided(number: int, divisor: int) -> int:
    """The least whole number of `divisor` that holds `number`."""
    return -(-number // divisor)


def token_chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices of at most `chunk_tokens` tokens; one slice when that is 0, none when there are no tokens."""
    step = chunk_tokens or max(1, num_tokens)
    assert step % CHUNK_MULTIPLE == 0 or not chunk_tokens, "a chunk must end where tiles end"
    return [slice(first, min(first + step, num_tokens)) for first in range(0, num_tokens, step)]


def token_splits(num_tokens: int, channels: int, tile: Tile) -> int:
    """How many programs share one block of channels (or columns) in backward_apply and backward_phi."""
    wanted = ceil_divided(PROGRAMS_WANTED, ceil_divided(channels, tile.channels))
    return max(1, min(num_tokens // SMALLEST_TOKEN_SPLIT, wanted))


def parameter_splits(num_tokens: int, num_streams: int, channels: int, tiles: TileSet) -> TokenSplits:
    """How many partial sums over tokens there are of dphi and dgain."""
    apply_splits = token_splits(num_tokens, channels, tiles.backward_apply)
    if tiles.backward_phi is None:
        return TokenSplits(apply_splits, apply_splits)
    return TokenSplits(token_splits(num_tokens, num_streams * channels, tiles.backward_phi), apply_splits)


def tokens_per_split(num_tokens: int, splits: int, tile: Tile) -> int:
    """Whole tiles."""
    return ceil_divided(ceil_divided(num_tokens, splits), tile.tokens) * tile.tokens


def padded_coefficients(spec: ConnectionSpec) -> int:
    return max(16, power_of_two_at_least(spec.num_coefficients))


def split_channels(channels: int, tiles: TileSet) -> int:
    """Channels per split of post_project, a multiple of its tile."""
    width = tiles.post_project.channels
    return ceil_divided(ceil_divided(channels, tiles.project_splits), width) * width
