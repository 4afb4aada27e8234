"""How the work of a launch is cut: chunks of tokens, splits of tokens and of channels, padded widths."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.formula import TokenSplits
from mhc_kernels.spec import ConnectionSpec
from mhc_kernels.tiles import CHUNK_MULTIPLE, Tile, TileSet, power_of_two_at_least

PROGRAMS_WANTED = 528
"""Programs that backward_apply aims for: four per multiprocessor of the largest supported devices."""
SMALLEST_TOKEN_SPLIT = 256
"""Below this many tokens per split, the partial dphi would outweigh what the split reads."""


def token_chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Slices of at most `chunk_tokens` tokens; one slice when that is 0, none when there are no tokens."""
    step = chunk_tokens or max(1, num_tokens)
    assert step % CHUNK_MULTIPLE == 0 or not chunk_tokens, "a chunk must end where tiles end"
    return [slice(first, min(first + step, num_tokens)) for first in range(0, num_tokens, step)]


def token_splits(num_tokens: int, channels: int, tile: Tile) -> int:
    """How many programs share one block of channels (or columns) in backward_apply and backward_phi."""
    wanted = int(triton.cdiv(PROGRAMS_WANTED, triton.cdiv(channels, tile.channels)))
    return max(1, min(num_tokens // SMALLEST_TOKEN_SPLIT, wanted))


def parameter_splits(num_tokens: int, num_streams: int, channels: int, tiles: TileSet) -> TokenSplits:
    """How many partial sums over tokens there are of dphi and dgain."""
    apply_splits = token_splits(num_tokens, channels, tiles.backward_apply)
    if tiles.backward_phi is None:
        return TokenSplits(apply_splits, apply_splits)
    return TokenSplits(token_splits(num_tokens, num_streams * channels, tiles.backward_phi), apply_splits)


def tokens_per_split(num_tokens: int, splits: int, tile: Tile) -> int:
    """Whole tiles."""
    return int(triton.cdiv(triton.cdiv(num_tokens, splits), tile.tokens) * tile.tokens)


def padded_coefficients(spec: ConnectionSpec) -> int:
    return max(16, power_of_two_at_least(spec.num_coefficients))


def split_channels(channels: int, tiles: TileSet) -> int:
    """Channels per split of post_project, a multiple of its tile."""
    width = tiles.post_project.channels
    return int(triton.cdiv(triton.cdiv(channels, tiles.project_splits), width) * width)


def product_precision(streams_TNC: Tensor, tiles: TileSet) -> str:
    return tiles.precision if streams_TNC.dtype == torch.bfloat16 else "ieee"
