# mypy: ignore-errors
# Device code is Triton's language, not typed Python.
"""K1: x' = res x + post y, rounded and stored; partial projections phi x' and partial squares of x'.

Grid (T / BT, SPLITS). A program owns BT tokens and a contiguous range of channels of all N streams. Partials
are stored per split and summed by mix_pre in split order: no atomics. Without an update (HAS_UPDATE false)
this is the kernel `project` of a chunk's first sublayer: nothing is stored but the partials.

The product is written transposed for the reason told in backward_apply: tiles stay as loaded, one token to a
thread. At n = 8 coefficients are loaded where they are used; held, they would take 72 registers.
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import load_coefficients, load_mixing_again, load_streams, mixed_stream


@triton.jit(do_not_specialize=["num_tokens"])
def post_project_kernel(
    x_ptr,  # (T, N, C) streams
    y_ptr,  # (T, C) output of sublayer l
    post_ptr,  # (T, N) fp32
    res_ptr,  # (T, N, N) fp32
    phi_ptr,  # (M, N*C) fp32
    out_ptr,  # (T, N, C) x'
    partial_ptr,  # (SPLITS, T, M) fp32
    square_ptr,  # (SPLITS, T) fp32
    num_tokens,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    SPLIT_CHANNELS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    split = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    coefficient = tl.arange(0, M_PAD)
    HELD: tl.constexpr = N <= 4
    if HAS_UPDATE:
        y_ptr += first * C
        post_ptr += first * N
        out_ptr += first * (N * C)
        if MIXED:
            res_ptr += first * (N * N)
        if HELD:
            post = load_coefficients(post_ptr, rows, row_ok, N, N)
            res = ()
            if MIXED:
                res = load_coefficients(res_ptr, rows, row_ok, N * N, N * N)

    projection = tl.zeros((M_PAD, BT), dtype=tl.float32)
    squares = tl.zeros((BT, BC), dtype=tl.float32)
    for offset in tl.range(0, SPLIT_CHANNELS, BC, disable_licm=not HELD):
        cols = split * SPLIT_CHANNELS + offset + tl.arange(0, BC)
        col_ok = (cols < C) & (offset + tl.arange(0, BC) < SPLIT_CHANNELS)
        mask = row_ok[:, None] & col_ok[None, :]
        xs = load_streams(x_ptr, rows, cols, mask, N, C)
        if HAS_UPDATE:
            y = tl.load(y_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        for o in tl.static_range(N):
            if HAS_UPDATE:
                if HELD:
                    x_new = mixed_stream(o, xs, y, post, res, N, MIXED)
                else:
                    post_o, res_o = load_mixing_again(o, post_ptr, res_ptr, rows, row_ok, N, MIXED)
                    x_new = mixed_stream(0, xs if MIXED else (xs[o],), y, post_o, res_o, N, MIXED)
                rounded = x_new.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + rows[:, None] * (N * C) + o * C + cols[None, :], rounded, mask=mask)
                x_new = rounded.to(tl.float32)
            else:
                x_new = xs[o]
            squares += x_new * x_new
            phi_offsets = coefficient[:, None] * (N * C) + o * C + cols[None, :]
            phi = tl.load(phi_ptr + phi_offsets, mask=(coefficient < M)[:, None] & col_ok[None, :], other=0.0)
            projection = tl.dot(phi, tl.trans(x_new), projection, input_precision=PRECISION)

    out_first = split * num_tokens.to(tl.int64) + first
    partials = partial_ptr + out_first * M + rows[:, None] * M + coefficient[None, :]
    partial_mask = row_ok[:, None] & (coefficient < M)[None, :]
    tl.store(partials, tl.trans(projection), mask=partial_mask)
    tl.store(square_ptr + out_first + rows, tl.sum(squares, axis=1), mask=row_ok)
