# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""B2 at n = 8: what `backward_apply` does, but for dphi, which `backward_phi` sums.

dphi's 80 (padded: 128) coefficients times 8 streams would take 128 registers of each of 256 threads at 32
channels; fewer channels would multiply the partial sums of dres and dpost, 72 floats per token and block of
channels. Without dphi there is room for the 8 streams and their 8 gradients, if nothing is held that can be
had again from a cache:

* coefficients are loaded where they are used: the 64 of res would be a quarter of all registers;
* after the products x and y are loaded once more, x one stream at a time; its dots with all gradients are a
  column of dres.

Grid (C / BC, TOKEN_SPLITS), partial sums and ACCUMULATE as in backward_apply.
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import (
    load_again,
    load_mixing_again,
    load_streams,
    load_tile_again,
    mixed_stream,
    side_by_side,
    stream_dots,
)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
def backward_streams_kernel(
    x_ptr,  # (T, N, C) streams the seam read
    y_ptr,  # (T, C)
    post_ptr,  # (T, N) fp32
    res_ptr,  # (T, N, N) fp32
    g_ptr,  # (T, N, C) gradient of x' from the next seam
    d_h_ptr,  # (T, C)
    gain_ptr,  # (C,)
    used_pre_ptr,  # (T, N) fp32
    rstd_h_ptr,  # (T,) fp32
    h_dot_ptr,  # (T,) fp32
    shrink_ptr,  # (T,) fp32
    d_projection_ptr,  # (T, M) fp32
    phi_ptr,  # (M, N*C) fp32
    d_x_ptr,  # (T, N, C)
    d_y_ptr,  # (T, C)
    d_post_ptr,  # (C / BC, T, N) fp32: partial sums over channels
    d_res_ptr,  # (C / BC, T, N, N) fp32
    d_gain_ptr,  # (TOKEN_SPLITS, C) fp32
    num_tokens,
    tokens_per_split,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    MIXED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    channel_block, token_split = tl.program_id(0), tl.program_id(1)
    cols = channel_block * BC + tl.arange(0, BC)
    col_ok = cols < C
    coefficient = tl.arange(0, M_PAD)
    phi_offsets = coefficient[:, None] * (N * C) + cols[None, :]
    phi_mask = (coefficient < M)[:, None] & col_ok[None, :]
    n_index = tl.arange(0, N)
    num_rows = num_tokens.to(tl.int64)
    d_gain = tl.zeros((BT, BC), dtype=tl.float32)
    rows = tl.arange(0, BT)
    row_offsets = rows[:, None] * C + cols[None, :]
    stream_offsets = rows[:, None] * (N * C) + cols[None, :]
    split_first = token_split.to(tl.int64) * tokens_per_split
    split_size = tl.minimum(tokens_per_split, num_tokens - token_split * tokens_per_split)
    for offset in tl.range(0, split_size, BT, disable_licm=True):
        first = split_first + offset
        row_ok = rows < split_size - offset
        mask = row_ok[:, None] & col_ok[None, :]
        x_tile = x_ptr + first * (N * C) + stream_offsets
        pre_tile = used_pre_ptr + first * N
        if HAS_UPDATE:
            post_tile = post_ptr + first * N
            y_tile = y_ptr + first * C + row_offsets
            y = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
        res_tile = res_ptr
        if MIXED:
            res_tile += first * (N * N)

        # u, and the part of x''s gradient that needs x' itself. Each x'[o] is dropped after use.
        xs = load_streams(x_ptr + first * (N * C), rows, cols, mask, N, C)
        shrink = tl.load(shrink_ptr + first + rows, mask=row_ok, other=0.0)
        g_tile = g_ptr + first * (N * C) + stream_offsets
        u = tl.zeros((BT, BC), dtype=tl.float32)
        shrunk = ()
        for o in tl.static_range(N):
            if HAS_UPDATE:
                post_o, res_o = load_mixing_again(o, post_tile, res_tile, rows, row_ok, N, MIXED)
                x_new = mixed_stream(0, xs if MIXED else (xs[o],), y, post_o, res_o, N, MIXED)
                x_new = x_new.to(x_ptr.dtype.element_ty).to(tl.float32)
            else:
                x_new = xs[o]
            u += load_again(pre_tile + o, rows, row_ok, N)[:, None] * x_new
            g = tl.load(g_tile + o * C, mask=mask, other=0.0).to(tl.float32)
            shrunk = shrunk + (g - shrink[:, None] * x_new,)

        # Through the RMSNorm and the projection: the total gradient of x'.
        rstd_h = tl.load(rstd_h_ptr + first + rows, mask=row_ok, other=0.0)
        h_dot = tl.load(h_dot_ptr + first + rows, mask=row_ok, other=0.0)
        d_h = tl.load(d_h_ptr + first * C + row_offsets, mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + cols, mask=col_ok, other=0.0, cache_modifier=".ca").to(tl.float32)
        unit = u * rstd_h[:, None]
        d_gain += d_h * unit
        d_u = (d_h * gain[None, :] - unit * h_dot[:, None]) * rstd_h[:, None]
        d_projection = tl.load(
            d_projection_ptr + first * M + rows[:, None] * M + coefficient[None, :],
            mask=row_ok[:, None] & (coefficient < M)[None, :],
            other=0.0,
        )
        totals = ()
        for o in tl.static_range(N):
            phi = tl.load(phi_ptr + phi_offsets + o * C, mask=phi_mask, other=0.0)
            through = tl.dot(tl.trans(phi), tl.trans(d_projection), input_precision=PRECISION)
            pre_o = load_again(pre_tile + o, rows, row_ok, N)
            totals = totals + (shrunk[o] + pre_o[:, None] * d_u + tl.trans(through),)

        # And through the update.
        d_x_tile = d_x_ptr + first * (N * C) + stream_offsets
        if HAS_UPDATE:
            block_first = channel_block * num_rows + first
            y = load_tile_again(y_tile, mask)
            d_posts = d_post_ptr + block_first * N + rows[:, None] * N + n_index[None, :]
            tl.store(d_posts, stream_dots(y, totals, N), mask=row_ok[:, None])
            d_y = tl.zeros((BT, BC), dtype=tl.float32)
            for o in tl.static_range(N):
                d_y += load_again(post_tile + o, rows, row_ok, N)[:, None] * totals[o]
            tl.store(d_y_ptr + first * C + row_offsets, d_y.to(d_y_ptr.dtype.element_ty), mask=mask)
        columns = ()
        for i in tl.static_range(N):
            if MIXED:
                columns = columns + (stream_dots(load_tile_again(x_tile + i * C, mask), totals, N),)
                d_x = tl.zeros((BT, BC), dtype=tl.float32)
                for o in tl.static_range(N):
                    d_x += load_again(res_tile + (o * N + i), rows, row_ok, N * N)[:, None] * totals[o]
            else:
                d_x = totals[i]
            tl.store(d_x_tile + i * C, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        if MIXED:
            d_res = tl.reshape(side_by_side(columns, N), (BT, N * N))
            d_res_tile = d_res_ptr + block_first * (N * N) + rows[:, None] * (N * N)
            tl.store(d_res_tile + tl.arange(0, N * N)[None, :], d_res, mask=row_ok[:, None])

    d_gain_columns = tl.sum(d_gain, axis=0)
    if ACCUMULATE:
        d_gain_columns += tl.load(d_gain_ptr + token_split * C + cols, mask=col_ok, other=0.0)
    tl.store(d_gain_ptr + token_split * C + cols, d_gain_columns, mask=col_ok)
