# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""Pieces shared by the kernels: tiles of streams and the arithmetic that must be identical everywhere.

Legend: T tokens, N streams, C channels, M coefficients per token; BT, BC tile sizes; `rows` (BT,) token
indices, `cols` (BC,) channel indices. Streams are tuples of N tiles (BT, BC), coefficients tuples of (BT,).

Addresses: a scalar 64-bit base (the tile's first token) plus 32-bit offsets within the tile; `rows` count
from the base. Tiles of 64-bit addresses would cost two registers per element and tensor.

`mixed_stream` and `scaled_input` are the only places where x' and h are computed. Forward, backward and
recompute call them with the same operands in the same order, which is what makes recompute bit-equal. Their
sums are fused multiply-adds in so many words: which products a compiler fuses could differ between kernels.
"""

import triton
import triton.language as tl


@triton.jit
def load_coefficients(pointer, rows, row_ok, stride, COUNT: tl.constexpr):
    """COUNT vectors (BT,) of a (T, stride) fp32 array."""
    loaded = ()
    for k in tl.static_range(COUNT):
        loaded = loaded + (tl.load(pointer + rows * stride + k, mask=row_ok, other=0.0),)
    return loaded


@triton.jit
def load_streams(pointer, rows, cols, mask, N: tl.constexpr, C: tl.constexpr):
    """N tiles (BT, BC) of a (T, N, C) array, in fp32."""
    loaded = ()
    for i in tl.static_range(N):
        offsets = rows[:, None] * (N * C) + cols[None, :]
        loaded = loaded + (tl.load(pointer + i * C + offsets, mask=mask, other=0.0).to(tl.float32),)
    return loaded


@triton.jit
def load_again(pointer, rows, row_ok, stride):
    """A coefficient (BT,) that was loaded before: from a cache instead of registers. The cache modifier keeps
    the compiler from merging the two loads."""
    return tl.load(pointer + rows * stride, mask=row_ok, other=0.0, cache_modifier=".ca")


@triton.jit
def load_tile_again(pointers, mask):
    """A tile (BT, BC) in fp32, likewise."""
    return tl.load(pointers, mask=mask, other=0.0, cache_modifier=".ca").to(tl.float32)


@triton.jit
def mixed_stream(o: tl.constexpr, xs, y, post, res, N: tl.constexpr, MIXED: tl.constexpr):
    """x'[o] = post[o] y + sum_i res[o, i] x[i], (BT, BC) fp32 before rounding. Not MIXED: H_res = I."""
    if MIXED:
        total = post[o][:, None] * y
        for i in tl.static_range(N):
            total = tl.fma(res[o * N + i][:, None], xs[i], total)
    else:
        total = tl.fma(post[o][:, None], y, xs[o])
    return total


@triton.jit
def collapsed(xs, pre, N: tl.constexpr):
    """u = sum_i pre[i] x[i], (BT, BC) fp32."""
    total = pre[0][:, None] * xs[0]
    for i in tl.static_range(1, N):
        total = tl.fma(pre[i][:, None], xs[i], total)
    return total


@triton.jit
def scaled_input(u, rstd, gain):
    """h before rounding: RMSNorm of u."""
    return u * rstd[:, None] * gain[None, :]


@triton.jit
def neighbour_sums(tile):
    """(BT, BC / 8): sums of 8 neighbours. They lie in one thread, so this costs no exchange."""
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 8)), axis=2)


@triton.jit
def side_by_side(tiles, N: tl.constexpr):
    """N tiles of one shape as last dimensions of 2 each; reshaped to (..., N), tile i is at i."""
    if N == 2:
        joined = tl.join(tiles[0], tiles[1])
    elif N == 4:
        joined = tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3]))
    else:
        tl.static_assert(N == 8)
        joined = tl.join(
            tl.join(tl.join(tiles[0], tiles[4]), tl.join(tiles[2], tiles[6])),
            tl.join(tl.join(tiles[1], tiles[5]), tl.join(tiles[3], tiles[7])),
        )
    return joined


@triton.jit
def stream_dots(tile, xs, N: tl.constexpr):
    """<tile, x[i]> over the channels for all i, (BT, N): one reduction for all streams.

    Every reduction over channels ends in a barrier when warps share rows, so N of them are joined into one;
    neighbours are added first, so that what is joined is small.
    """
    sums = ()
    for i in tl.static_range(N):
        sums = sums + (neighbour_sums(tile * xs[i]),)
    return tl.reshape(tl.sum(side_by_side(sums, N), axis=1), (tile.shape[0], N))


@triton.jit
def sigmoid(logits):
    return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit
def sigmoid_slope(logits):
    """sigmoid * (1 - sigmoid) without the difference, which would be 0 from logits of 17 on."""
    small = tl.exp(-tl.abs(logits))
    return small / ((1.0 + small) * (1.0 + small))


@triton.jit
def load_mixing_again(o: tl.constexpr, post_ptr, res_ptr, rows, row_ok, N: tl.constexpr, MIXED: tl.constexpr):
    """post[o] and, when MIXED, row o of res, from a cache: a tuple of one and a tuple of N (or of none)."""
    post_o = (load_again(post_ptr + o, rows, row_ok, N),)
    res_o = ()
    if MIXED:
        for i in tl.static_range(N):
            res_o = res_o + (load_again(res_ptr + (o * N + i), rows, row_ok, N * N),)
    return post_o, res_o
