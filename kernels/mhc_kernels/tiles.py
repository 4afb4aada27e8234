"""The checked-in tile of every kernel, by architecture, stream count and width. Nothing is tuned at run time.

Chosen from the resource report (`python -m mhc_kernels.resources`): the largest tile without spills; where
two fit, the one with wider accesses. A tile is also part of the numerics (it fixes the order of sums), so the
results of a run do not depend on which tile happened to be fastest that day.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """Tokens and channels of one program, its warps, and how many iterations its loads run ahead (loops
    only). Row kernels take whole rows: channels is then the width rounded up to a power of two."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int = 2


class TileSet(NamedTuple):
    """Tiles of one (architecture, n, C bucket)."""

    post_project: Tile
    mix_pre: Tile
    streams: Tile
    backward_dots: Tile
    backward_apply: Tile
    backward_phi: Tile | None
    """None where backward_apply sums dphi in its registers. Else backward_streams goes before, with the tile
    of `backward_apply`."""
    post_backward: Tile
    project_splits: int
    precision: str
    """Input precision of the matrix products for bf16 streams; fp32 streams always use `ieee`."""


ARCHITECTURES = ("sm_90", "sm_100", "gfx942")
L2_BYTES = {"sm_90": 50 << 20, "sm_100": 126 << 20, "gfx942": 4 << 20}
"""Second-level cache that one program can reach (gfx942: of one die), from the vendors' data sheets."""
CHUNK_MULTIPLE = 64
"""Chunks end where the tiles of tokens of every kernel end, so that chunking does not move a tile."""
WIDTH_BUCKETS = (1536, 3072, 5120, 8192)
"""Upper ends of the C buckets. Wider streams take the tiles of the last one, and `backward_dots`, which holds
whole rows of all streams, spills."""


def power_of_two_at_least(value: int) -> int:
    return 1 << (value - 1).bit_length()


@functools.cache
def tiles_for(architecture: str, num_streams: int, channels: int, item_bytes: int = 2) -> TileSet:
    """The tile set for streams of `item_bytes` a value; ValueError for an unknown architecture."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} has no tiles: use one of {', '.join(ARCHITECTURES)}")
    bucket = next((width for width in WIDTH_BUCKETS if channels <= width), WIDTH_BUCKETS[-1])
    amd = architecture.startswith("gfx")
    row_warps = {1536: 4, 3072: 8, 5120: 8, 8192: 16}[bucket]
    mix_warps = min(8, row_warps)
    row = power_of_two_at_least(channels)
    row_tokens = 2 if row <= 2048 else 1
    return TileSet(
        post_project=_post_project(architecture, num_streams, item_bytes),
        mix_pre=Tile(row_tokens, row, mix_warps),
        streams=Tile(8, 128, 4),
        backward_dots=Tile(1, row, row_warps),
        backward_apply=_backward_apply(architecture, num_streams, item_bytes),
        backward_phi=Tile(32, 128, 8) if num_streams > 4 else None,
        post_backward=Tile(16, 128, 8),
        project_splits=2,
        precision="ieee" if amd else "tf32",
    )


def _post_project(architecture: str, num_streams: int, item_bytes: int) -> Tile:
    """At n = 8 the tiles of phi, 80 coefficients padded to 128, by 8 streams, leave no room in shared memory
    for loads that run ahead. Products of fp32 streams use no matrix unit; larger tiles of them spill."""
    if architecture.startswith("gfx"):
        return Tile(32, 32, 2) if num_streams <= 4 else Tile(16, 32, 2, num_stages=1)
    if item_bytes > 2:
        return Tile(32, 32, 8)
    return Tile(64, 32, 8, num_stages=3 if num_streams <= 4 else 1)


def _backward_apply(architecture: str, num_streams: int, item_bytes: int) -> Tile:
    """64 channels are the 64 rows that Hopper's and Blackwell's matrix units start from."""
    if architecture.startswith("gfx"):
        return Tile(16, 32, 2, num_stages=2 if num_streams <= 4 else 1)
    if item_bytes > 2:
        return Tile(16, 32, 8, num_stages=1)
    if num_streams > 4:
        return Tile(32, 64, 8, num_stages=1)
    return Tile(32, 64, 8, num_stages=2 if architecture == "sm_90" else 1)


def chunk_tokens(architecture: str, num_streams: int, channels: int, item_bytes: int) -> int:
    """Tokens per chunk of a chunked launch: what passes through the cache between a first kernel's access to
    a row and the second's (x, y, x' forward; x, y, dh, g, dx backward: 2n + 2 rows) fills half of it."""
    row_bytes = (2 * num_streams + 2) * channels * item_bytes
    chunks = L2_BYTES[architecture] // 2 // (row_bytes * CHUNK_MULTIPLE)
    return max(1, chunks) * CHUNK_MULTIPLE


SWIGLU_TILE = Tile(1, 1024, 4)
"""Eight neighbours to a thread: 128 bits of bf16."""


def token_row_tile(channels: int) -> Tile:
    """The row of one token or expert's choice, whatever the architecture: 16 values to a thread."""
    row = power_of_two_at_least(channels)
    return Tile(1, row, max(1, min(16, row // 512)))
