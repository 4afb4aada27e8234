# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""B1: everything about a token that needs its whole row: dh . x'[i], and from it the coefficients' gradients.

Grid (T / BT,). Reads x' (N*C) and dh (C) once, keeps them in registers, and writes coefficient-sized results
only. The gradient of the streams is not needed here: it meets x' in backward_apply.

With REMIX it reads x and y instead and recomputes x': a row more, but backward_apply reads the same rows, and
in a chunked launch finds them in the cache.
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import load_coefficients, mixed_stream, sigmoid_slope
from mhc_kernels.device.mix_pre import IDENTITY, PERMUTATIONS, SINKHORN
from mhc_kernels.device.sinkhorn import sinkhorn_backward


@triton.jit(do_not_specialize=["num_tokens", "d_handed_stride", "d_post_stride", "d_res_stride"])
def backward_dots_kernel(
    x_ptr,  # (T, N, C) x'; with REMIX x
    y_ptr,  # (T, C), with REMIX
    post_ptr,  # (T, N) fp32, with REMIX
    res_ptr,  # (T, N, N) fp32, with REMIX and MIXED
    d_h_ptr,  # (T, C)
    gain_ptr,  # (C,)
    used_pre_ptr,  # (T, N) fp32: the H_pre that collapsed x'
    rstd_h_ptr,  # (T,) fp32
    rstd_x_ptr,  # (T,) fp32
    mix_ptr,  # (T, M) fp32
    alpha_ptr,  # (3,) fp32
    bias_ptr,  # (M,) fp32
    d_handed_pre_ptr,  # (T, N) fp32, row stride d_handed_stride; with HANDED
    d_post_ptr,  # (T, N) fp32, row stride d_post_stride
    d_res_ptr,  # (T, N*N) fp32, row stride d_res_stride
    permutation_ptr,  # (P_PAD, N*N) fp32, with PERMUTATIONS
    d_used_pre_ptr,  # (T, N) fp32, written with CARRIED
    d_projection_ptr,  # (T, M) fp32: gradient of phi x'
    shrink_ptr,  # (T,) fp32: factor of x' in the gradient of its rms
    h_dot_ptr,  # (T,) fp32: mean(dh gain unit)
    d_logit_ptr,  # (PROGRAMS, 2, M) fp32: sums over the program's tokens of dlogit and dlogit * mix
    num_tokens,
    d_handed_stride,
    d_post_stride,
    d_res_stride,
    sinkhorn_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MIXING: tl.constexpr,
    ITERATIONS: tl.constexpr,
    P_PAD: tl.constexpr,
    CARRIED: tl.constexpr,
    HANDED: tl.constexpr,
    REMIX: tl.constexpr,
    MIXED: tl.constexpr,
    BT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    first = program.to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    d_h_ptr += first * C
    used_pre_ptr += first * N
    mix_ptr += first * M
    d_post_ptr += first * d_post_stride
    d_projection_ptr += first * M
    rstd_h_ptr += first
    rstd_x_ptr += first
    h_dot_ptr += first
    shrink_ptr += first
    n_index = tl.arange(0, N)
    row_n = row_ok[:, None]
    cols = tl.arange(0, BLOCK_C)
    col_ok = cols < C
    mask = row_ok[:, None] & col_ok[None, :]

    # The gradient of u, from the row in registers.
    used = tl.load(used_pre_ptr + rows[:, None] * N + n_index[None, :], mask=row_n, other=0.0)
    xs = ()
    for i in tl.static_range(N):
        offsets = rows[:, None] * (N * C) + i * C + cols[None, :]
        xs = xs + (tl.load(x_ptr + offsets, mask=mask, other=0.0),)
    if REMIX:
        y = tl.load(y_ptr + first * C + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        post = load_coefficients(post_ptr + first * N, rows, row_ok, N, N)
        res = ()
        if MIXED:
            res = load_coefficients(res_ptr + first * (N * N), rows, row_ok, N * N, N * N)
        wide = ()
        for i in tl.static_range(N):
            wide = wide + (xs[i].to(tl.float32),)
        xs = ()
        for o in tl.static_range(N):
            xs = xs + (mixed_stream(o, wide, y, post, res, N, MIXED).to(x_ptr.dtype.element_ty),)
    unit = tl.zeros((BT, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(N):
        pre_i = tl.sum(tl.where(n_index[None, :] == i, used, 0.0), axis=1)
        unit += pre_i[:, None] * xs[i].to(tl.float32)
    rstd_h = tl.load(rstd_h_ptr + rows, mask=row_ok, other=0.0)
    unit = unit * rstd_h[:, None]
    gain = tl.load(gain_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
    d_h = tl.load(d_h_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    d_unit = d_h * gain[None, :]
    h_dot = tl.sum(d_unit * unit, axis=1) / C
    tl.store(h_dot_ptr + rows, h_dot, mask=row_ok)
    d_u = (d_unit - unit * h_dot[:, None]) * rstd_h[:, None]

    # dpre[i] = <x'[i], du>; it belongs to the H_pre that was used.
    d_used = tl.zeros((BT, N), dtype=tl.float32)
    for i in tl.static_range(N):
        dot = tl.sum(xs[i].to(tl.float32) * d_u, axis=1)
        d_used += tl.where(n_index[None, :] == i, dot[:, None], 0.0)
    d_pre = tl.zeros((BT, N), dtype=tl.float32)
    if HANDED:
        d_handed_pre_ptr += first * d_handed_stride
        handed_offsets = rows[:, None] * d_handed_stride + n_index[None, :]
        d_pre += tl.load(d_handed_pre_ptr + handed_offsets, mask=row_n, other=0.0)
    if CARRIED:
        d_used_pre_ptr += first * N
        tl.store(d_used_pre_ptr + rows[:, None] * N + n_index[None, :], d_used, mask=row_n)
    else:
        d_pre += d_used

    # Through the sigmoids.
    rstd_x = tl.load(rstd_x_ptr + rows, mask=row_ok, other=0.0)
    alpha_pre, alpha_post, alpha_res = tl.load(alpha_ptr), tl.load(alpha_ptr + 1), tl.load(alpha_ptr + 2)
    mix_n = mix_ptr + rows[:, None] * M + n_index[None, :]
    mix_pre = tl.load(mix_n, mask=row_n, other=0.0)
    mix_post = tl.load(mix_n + N, mask=row_n, other=0.0)
    pre_slope = sigmoid_slope(alpha_pre * mix_pre + tl.load(bias_ptr + n_index)[None, :])
    half_post_slope = sigmoid_slope(alpha_post * mix_post + tl.load(bias_ptr + N + n_index)[None, :])
    d_post = tl.load(d_post_ptr + rows[:, None] * d_post_stride + n_index[None, :], mask=row_n, other=0.0)
    d_logit_pre = d_pre * pre_slope
    d_logit_post = 2.0 * d_post * half_post_slope
    projection_n = d_projection_ptr + rows[:, None] * M + n_index[None, :]
    d_mix_pre, d_mix_post = alpha_pre * d_logit_pre, alpha_post * d_logit_post
    tl.store(projection_n, d_mix_pre * rstd_x[:, None], mask=row_n)
    tl.store(projection_n + N, d_mix_post * rstd_x[:, None], mask=row_n)
    shrink = tl.sum(d_mix_pre * mix_pre, axis=1) + tl.sum(d_mix_post * mix_post, axis=1)
    sums_ptr = d_logit_ptr + program.to(tl.int64) * (2 * M)
    tl.store(sums_ptr + n_index, tl.sum(tl.where(row_n, d_logit_pre, 0.0), axis=0))
    tl.store(sums_ptr + M + n_index, tl.sum(tl.where(row_n, d_logit_pre * mix_pre, 0.0), axis=0))
    tl.store(sums_ptr + N + n_index, tl.sum(tl.where(row_n, d_logit_post, 0.0), axis=0))
    tl.store(sums_ptr + M + N + n_index, tl.sum(tl.where(row_n, d_logit_post * mix_post, 0.0), axis=0))

    # Through the mixing of the streams.
    if MIXING == SINKHORN:
        d_res_ptr += first * d_res_stride
        nn_index = n_index[:, None] * N + n_index[None, :]
        row_nn = row_ok[:, None, None]
        mix_offsets = rows[:, None, None] * M + 2 * N + nn_index[None, :, :]
        mix_res = tl.load(mix_ptr + mix_offsets, mask=row_nn, other=0.0)
        logits = alpha_res * mix_res + tl.load(bias_ptr + 2 * N + nn_index)[None, :, :]
        d_res_offsets = rows[:, None, None] * d_res_stride + nn_index[None, :, :]
        d_res = tl.load(d_res_ptr + d_res_offsets, mask=row_nn, other=0.0)
        d_logit_res = sinkhorn_backward(logits, d_res, sinkhorn_eps, ITERATIONS)
        tl.store(d_projection_ptr + mix_offsets, alpha_res * d_logit_res * rstd_x[:, None, None], mask=row_nn)
        shrink += alpha_res * tl.sum(tl.sum(d_logit_res * mix_res, axis=2), axis=1)
        tl.store(sums_ptr + 2 * N + nn_index, tl.sum(tl.where(row_nn, d_logit_res, 0.0), axis=0))
        tl.store(
            sums_ptr + M + 2 * N + nn_index, tl.sum(tl.where(row_nn, d_logit_res * mix_res, 0.0), axis=0)
        )
    elif MIXING == PERMUTATIONS:
        d_res_ptr += first * d_res_stride
        p_index = tl.arange(0, P_PAD)
        p_ok = p_index < M - 2 * N
        row_p = row_ok[:, None] & p_ok[None, :]
        mix_offsets = rows[:, None] * M + 2 * N + p_index[None, :]
        mix_weight = tl.load(mix_ptr + mix_offsets, mask=row_p, other=0.0)
        logits = alpha_res * mix_weight + tl.load(bias_ptr + 2 * N + p_index, mask=p_ok, other=0.0)[None, :]
        logits = tl.where(p_ok[None, :], logits, float("-inf"))
        exponential = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
        weight = exponential / tl.sum(exponential, axis=1, keep_dims=True)
        flat_index = tl.arange(0, N * N)
        table = tl.load(permutation_ptr + p_index[:, None] * (N * N) + flat_index[None, :])
        d_res_offsets = rows[:, None] * d_res_stride + flat_index[None, :]
        d_res = tl.load(d_res_ptr + d_res_offsets, mask=row_n, other=0.0)
        gradient = weight * tl.sum(table[None, :, :] * d_res[:, None, :], axis=2)
        d_logit_weight = gradient - weight * tl.sum(gradient, axis=1, keep_dims=True)
        tl.store(d_projection_ptr + mix_offsets, alpha_res * d_logit_weight * rstd_x[:, None], mask=row_p)
        shrink += alpha_res * tl.sum(d_logit_weight * mix_weight, axis=1)
        tl.store(sums_ptr + 2 * N + p_index, tl.sum(tl.where(row_p, d_logit_weight, 0.0), axis=0), mask=p_ok)
        weighted = tl.sum(tl.where(row_p, d_logit_weight * mix_weight, 0.0), axis=0)
        tl.store(sums_ptr + M + 2 * N + p_index, weighted, mask=p_ok)
    else:
        tl.static_assert(MIXING == IDENTITY)
    tl.store(shrink_ptr + rows, shrink * rstd_x * rstd_x / (N * C), mask=row_ok)
