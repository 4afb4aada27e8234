# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""B2: total gradient of x', pushed on to x and y; partial sums of gradients reduced over tokens or channels.

Also the backward of `post` at a chunk's end (HAS_NEXT false: the incoming gradient is the total).

Grid (C / BC, TOKEN_SPLITS). A program owns BC channels of all streams, so phi stays near and dphi grows in
registers while it walks its tokens. x' is recomputed from x and y, which are read anyway. Sums over channels
(dres, dpost) are stored per channel block, sums over tokens (dphi, dgain) per token split; the
reduce_partials kernels add them in a fixed order.

With ACCUMULATE (all chunks of tokens but the first) dphi and dgain go on from what the chunk before left.

At n = 8 `backward_streams` and `backward_phi` take its place.

Registers are scarce here. Three things keep it within them at 8 channels, 128 bits, a thread:

* both products are written with channels as rows, (BC, .), and their results transposed. The compiler prefers
  the matrix unit's layout for everything a product touches, where a thread holds several tokens and hence the
  coefficients of all of them, and it recomputes x' in every layout it is wanted in. It does not do so through
  a transposition: tiles stay as loaded, one token to a thread;
* tiles are loaded where they are used. phi, and x the second time, come from a cache;
* dot products add up the neighbours within a thread before streams are joined (`stream_dots`).
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import (
    load_again,
    load_coefficients,
    load_streams,
    load_tile_again,
    mixed_stream,
    stream_dots,
)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
def backward_apply_kernel(
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
    d_phi_ptr,  # (TOKEN_SPLITS, M, N*C) fp32
    d_gain_ptr,  # (TOKEN_SPLITS, C) fp32
    num_tokens,
    tokens_per_split,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_NEXT: tl.constexpr,
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
    coefficient_ok = coefficient < M
    n_index = tl.arange(0, N)
    num_rows = num_tokens.to(tl.int64)

    if HAS_NEXT:
        gain = tl.load(gain_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
        d_gain = tl.zeros((BT, BC), dtype=tl.float32)
        phi_offsets = coefficient[:, None] * (N * C) + cols[None, :]
        phi_mask = coefficient_ok[:, None] & col_ok[None, :]
        split_phi_ptr = d_phi_ptr + token_split.to(tl.int64) * (M * N * C)
        d_phis = ()
        for o in tl.static_range(N):
            if ACCUMULATE:
                before = tl.load(split_phi_ptr + phi_offsets + o * C, mask=phi_mask, other=0.0)
                d_phis = d_phis + (tl.trans(before),)
            else:
                d_phis = d_phis + (tl.zeros((BC, M_PAD), dtype=tl.float32),)

    rows = tl.arange(0, BT)
    row_offsets = rows[:, None] * C + cols[None, :]
    stream_offsets = rows[:, None] * (N * C) + cols[None, :]
    split_first = token_split.to(tl.int64) * tokens_per_split
    split_size = tl.minimum(tokens_per_split, num_tokens - token_split * tokens_per_split)
    for offset in range(0, split_size, BT):
        first = split_first + offset
        row_ok = rows < split_size - offset
        mask = row_ok[:, None] & col_ok[None, :]
        xs = load_streams(x_ptr + first * (N * C), rows, cols, mask, N, C)
        if not HAS_NEXT:
            totals = load_streams(g_ptr + first * (N * C), rows, cols, mask, N, C)
        if HAS_UPDATE:
            y = tl.load(y_ptr + first * C + row_offsets, mask=mask, other=0.0).to(tl.float32)

        if HAS_NEXT:
            # Each x'[o] is recomputed, used in three places, and dropped: registers are scarce here.
            pre = load_coefficients(used_pre_ptr + first * N, rows, row_ok, N, N)
            rstd_h = tl.load(rstd_h_ptr + first + rows, mask=row_ok, other=0.0)
            h_dot = tl.load(h_dot_ptr + first + rows, mask=row_ok, other=0.0)
            shrink = tl.load(shrink_ptr + first + rows, mask=row_ok, other=0.0)
            d_projection = tl.load(
                d_projection_ptr + first * M + rows[:, None] * M + coefficient[None, :],
                mask=row_ok[:, None] & coefficient_ok[None, :],
                other=0.0,
            )
            d_h = tl.load(d_h_ptr + first * C + row_offsets, mask=mask, other=0.0).to(tl.float32)
            if HAS_UPDATE:
                post = load_coefficients(post_ptr + first * N, rows, row_ok, N, N)
                res = ()
                if MIXED:
                    res = load_coefficients(res_ptr + first * (N * N), rows, row_ok, N * N, N * N)
            u = tl.zeros((BT, BC), dtype=tl.float32)
            grown = ()
            shrunk = ()
            g_tile = g_ptr + first * (N * C) + stream_offsets
            for o in tl.static_range(N):
                if HAS_UPDATE:
                    x_new = mixed_stream(o, xs, y, post, res, N, MIXED)
                    x_new = x_new.to(x_ptr.dtype.element_ty).to(tl.float32)
                else:
                    x_new = xs[o]
                u += pre[o][:, None] * x_new
                g = tl.load(g_tile + o * C, mask=mask, other=0.0).to(tl.float32)
                shrunk = shrunk + (g - shrink[:, None] * x_new,)
                d_phi = tl.dot(tl.trans(x_new), d_projection, d_phis[o], input_precision=PRECISION)
                grown = grown + (d_phi,)
            d_phis = grown
            unit = u * rstd_h[:, None]
            d_gain += d_h * unit
            d_u = (d_h * gain[None, :] - unit * h_dot[:, None]) * rstd_h[:, None]
            totals = ()
            for o in tl.static_range(N):
                phi = tl.load(phi_ptr + phi_offsets + o * C, mask=phi_mask, other=0.0)
                through = tl.dot(tl.trans(phi), tl.trans(d_projection), input_precision=PRECISION)
                totals = totals + (shrunk[o] + pre[o][:, None] * d_u + tl.trans(through),)

        # `totals` is the gradient of x'. Push it through the update.
        x_tile = x_ptr + first * (N * C) + stream_offsets
        d_x_tile = d_x_ptr + first * (N * C) + stream_offsets
        if HAS_UPDATE:
            block_first = channel_block * num_rows + first
            d_posts = d_post_ptr + block_first * N + rows[:, None] * N + n_index[None, :]
            tl.store(d_posts, stream_dots(y, totals, N), mask=row_ok[:, None])
            d_y = tl.zeros((BT, BC), dtype=tl.float32)
            for o in tl.static_range(N):
                d_y += load_again(post_ptr + first * N + o, rows, row_ok, N)[:, None] * totals[o]
            tl.store(d_y_ptr + first * C + row_offsets, d_y.to(d_y_ptr.dtype.element_ty), mask=mask)
        if MIXED:
            d_ress = d_res_ptr + block_first * (N * N) + rows[:, None] * (N * N) + n_index[None, :]
            if HAS_NEXT:
                xs = ()
                for i in tl.static_range(N):
                    xs = xs + (load_tile_again(x_tile + i * C, mask),)
            for o in tl.static_range(N):
                tl.store(d_ress + o * N, stream_dots(totals[o], xs, N), mask=row_ok[:, None])
            for i in tl.static_range(N):
                d_x = tl.zeros((BT, BC), dtype=tl.float32)
                for o in tl.static_range(N):
                    res_oi = load_again(res_ptr + first * (N * N) + (o * N + i), rows, row_ok, N * N)
                    d_x += res_oi[:, None] * totals[o]
                tl.store(d_x_tile + i * C, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        else:
            for o in tl.static_range(N):
                tl.store(d_x_tile + o * C, totals[o].to(d_x_ptr.dtype.element_ty), mask=mask)

    if HAS_NEXT:
        d_gain_columns = tl.sum(d_gain, axis=0)
        if ACCUMULATE:
            d_gain_columns += tl.load(d_gain_ptr + token_split * C + cols, mask=col_ok, other=0.0)
        tl.store(d_gain_ptr + token_split * C + cols, d_gain_columns, mask=col_ok)
        for o in tl.static_range(N):
            tl.store(split_phi_ptr + phi_offsets + o * C, tl.trans(d_phis[o]), mask=phi_mask)
