# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""K3 `post` (a chunk's end), K4 `pre` (the head's reduction), R `recompute_block`: grid (T / BT, C / BC)."""

import triton
import triton.language as tl

from mhc_kernels.device.common import (
    collapsed,
    load_coefficients,
    load_streams,
    mixed_stream,
    scaled_input,
)


@triton.jit(do_not_specialize=["num_tokens"])
def post_kernel(
    x_ptr,  # (T, N, C)
    y_ptr,  # (T, C)
    post_ptr,  # (T, N) fp32
    res_ptr,  # (T, N, N) fp32
    out_ptr,  # (T, N, C)
    num_tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    MIXED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    y_ptr += first * C
    post_ptr += first * N
    out_ptr += first * (N * C)
    if MIXED:
        res_ptr += first * (N * N)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = row_ok[:, None] & (cols < C)[None, :]
    post = load_coefficients(post_ptr, rows, row_ok, N, N)
    res = ()
    if MIXED:
        res = load_coefficients(res_ptr, rows, row_ok, N * N, N * N)
    xs = load_streams(x_ptr, rows, cols, mask, N, C)
    y = tl.load(y_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    for o in tl.static_range(N):
        rounded = mixed_stream(o, xs, y, post, res, N, MIXED).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * (N * C) + o * C + cols[None, :], rounded, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def pre_kernel(
    x_ptr,  # (T, N, C)
    pre_ptr,  # (T, N) fp32
    out_ptr,  # (T, C)
    num_tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    pre_ptr += first * N
    out_ptr += first * C
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = row_ok[:, None] & (cols < C)[None, :]
    pre = load_coefficients(pre_ptr, rows, row_ok, N, N)
    u = collapsed(load_streams(x_ptr, rows, cols, mask, N, C), pre, N)
    tl.store(out_ptr + rows[:, None] * C + cols[None, :], u.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def pre_backward_kernel(
    x_ptr,  # (T, N, C)
    pre_ptr,  # (T, N) fp32
    d_out_ptr,  # (T, C)
    d_x_ptr,  # (T, N, C)
    d_pre_ptr,  # (T, N) fp32
    num_tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Whole rows, grid (T / BT,): dpre[i] = <x[i], d_out> needs all channels."""
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    pre_ptr += first * N
    d_out_ptr += first * C
    d_x_ptr += first * (N * C)
    d_pre_ptr += first * N
    cols = tl.arange(0, BLOCK_C)
    mask = row_ok[:, None] & (cols < C)[None, :]
    d_out = tl.load(d_out_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(N):
        pre_i = tl.load(pre_ptr + rows * N + i, mask=row_ok, other=0.0)
        offsets = rows[:, None] * (N * C) + i * C + cols[None, :]
        x_i = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_pre_ptr + rows * N + i, tl.sum(x_i * d_out, axis=1), mask=row_ok)
        tl.store(d_x_ptr + offsets, (pre_i[:, None] * d_out).to(d_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def recompute_block_kernel(
    x_ptr,  # (T, N, C) streams before the block's first sublayer
    y_ptrs,  # tuple of L-1 (T, C)
    pre_ptrs,  # tuple of L (T, N) fp32
    rstd_ptrs,  # tuple of L (T,) fp32
    gain_ptrs,  # tuple of L (C,)
    post_ptrs,  # tuple of L-1 (T, N) fp32
    res_ptrs,  # tuple of L-1 (T, N, N) fp32; empty when not MIXED
    h_ptrs,  # tuple of L (T, C), written
    out_ptrs,  # tuple of L-1 (T, N, C), written
    num_tokens,
    L: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    MIXED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """L sublayers in one launch: the streams stay in registers, rounded as the forward rounded them."""
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    col_ok = cols < C
    mask = row_ok[:, None] & col_ok[None, :]
    row_offsets = rows[:, None] * C + cols[None, :]
    xs = load_streams(x_ptr + first * (N * C), rows, cols, mask, N, C)
    for k in tl.static_range(L):
        pre = load_coefficients(pre_ptrs[k] + first * N, rows, row_ok, N, N)
        rstd = tl.load(rstd_ptrs[k] + first + rows, mask=row_ok, other=0.0)
        gain = tl.load(gain_ptrs[k] + cols, mask=col_ok, other=0.0).to(tl.float32)
        h = scaled_input(collapsed(xs, pre, N), rstd, gain)
        tl.store(h_ptrs[k] + first * C + row_offsets, h.to(h_ptrs[k].dtype.element_ty), mask=mask)
        if k + 1 < L:
            post = load_coefficients(post_ptrs[k] + first * N, rows, row_ok, N, N)
            res = ()
            if MIXED:
                res = load_coefficients(res_ptrs[k] + first * (N * N), rows, row_ok, N * N, N * N)
            y = tl.load(y_ptrs[k] + first * C + row_offsets, mask=mask, other=0.0).to(tl.float32)
            new = ()
            for o in tl.static_range(N):
                rounded = mixed_stream(o, xs, y, post, res, N, MIXED).to(x_ptr.dtype.element_ty)
                out_ptr = out_ptrs[k] + first * (N * C) + o * C
                tl.store(out_ptr + rows[:, None] * (N * C) + cols[None, :], rounded, mask=mask)
                new = new + (rounded.to(tl.float32),)
            xs = new
