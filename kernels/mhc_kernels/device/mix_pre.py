# mypy: ignore-errors
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""K2: sum the partials in split order, coefficients (Sinkhorn in registers), collapse, RMSNorm: -> h.

Grid (T / BT,). A program owns whole rows: u stays in registers between the sum of its squares and h, so x' is
read once.
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import scaled_input, sigmoid
from mhc_kernels.device.sinkhorn import sinkhorn

SINKHORN, IDENTITY, PERMUTATIONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["num_tokens"])
def mix_pre_kernel(
    partial_ptr,  # (SPLITS, T, M) fp32
    square_ptr,  # (SPLITS, T) fp32
    alpha_ptr,  # (3,) fp32
    bias_ptr,  # (M,) fp32
    x_ptr,  # (T, N, C) x'
    gain_ptr,  # (C,)
    carried_pre_ptr,  # (T, N) fp32, with CARRIED
    permutation_ptr,  # (P_PAD, N*N) fp32, with PERMUTATIONS
    pre_ptr,  # (T, N) fp32
    post_ptr,  # (T, N) fp32
    res_ptr,  # (T, N, N) fp32
    mix_ptr,  # (T, M) fp32
    rstd_x_ptr,  # (T,) fp32
    rstd_h_ptr,  # (T,) fp32
    h_ptr,  # (T, C)
    num_tokens,
    pre_eps,
    sinkhorn_eps,
    projection_eps,
    norm_eps,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    MIXING: tl.constexpr,
    ITERATIONS: tl.constexpr,
    P_PAD: tl.constexpr,
    CARRIED: tl.constexpr,
    BT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BT
    rows = tl.arange(0, BT)
    row_ok = rows < num_tokens - first
    x_ptr += first * (N * C)
    h_ptr += first * C
    pre_ptr += first * N
    post_ptr += first * N
    mix_ptr += first * M
    rstd_x_ptr += first
    rstd_h_ptr += first
    n_index = tl.arange(0, N)
    row_n = row_ok[:, None]
    step = num_tokens.to(tl.int64)

    squares = tl.zeros((BT,), dtype=tl.float32)
    raw_pre = tl.zeros((BT, N), dtype=tl.float32)
    raw_post = tl.zeros((BT, N), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part_first = split * step + first
        squares += tl.load(square_ptr + part_first + rows, mask=row_ok, other=0.0)
        part_n = partial_ptr + part_first * M + rows[:, None] * M + n_index[None, :]
        raw_pre += tl.load(part_n, mask=row_n, other=0.0)
        raw_post += tl.load(part_n + N, mask=row_n, other=0.0)
    rstd_x = tl.rsqrt(squares / (N * C) + projection_eps)
    tl.store(rstd_x_ptr + rows, rstd_x, mask=row_ok)

    mix_pre = raw_pre * rstd_x[:, None]
    mix_post = raw_post * rstd_x[:, None]
    mix_n = mix_ptr + rows[:, None] * M + n_index[None, :]
    tl.store(mix_n, mix_pre, mask=row_n)
    tl.store(mix_n + N, mix_post, mask=row_n)
    pre = sigmoid(tl.load(alpha_ptr) * mix_pre + tl.load(bias_ptr + n_index)[None, :]) + pre_eps
    post = 2.0 * sigmoid(tl.load(alpha_ptr + 1) * mix_post + tl.load(bias_ptr + N + n_index)[None, :])
    coefficient_n = rows[:, None] * N + n_index[None, :]
    tl.store(pre_ptr + coefficient_n, pre, mask=row_n)
    tl.store(post_ptr + coefficient_n, post, mask=row_n)

    if MIXING == SINKHORN:
        res_ptr += first * (N * N)
        matrix_index = n_index[:, None] * N + n_index[None, :]
        row_nn = row_ok[:, None, None]
        raw_res = tl.zeros((BT, N, N), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            part_ptr = partial_ptr + (split * step + first) * M
            part_nn = part_ptr + rows[:, None, None] * M + 2 * N + matrix_index[None, :, :]
            raw_res += tl.load(part_nn, mask=row_nn, other=0.0)
        mix_res = raw_res * rstd_x[:, None, None]
        tl.store(mix_ptr + rows[:, None, None] * M + 2 * N + matrix_index[None, :, :], mix_res, mask=row_nn)
        logits = tl.load(alpha_ptr + 2) * mix_res + tl.load(bias_ptr + 2 * N + matrix_index)[None, :, :]
        res = sinkhorn(logits, sinkhorn_eps, ITERATIONS)
        tl.store(res_ptr + rows[:, None, None] * (N * N) + matrix_index[None, :, :], res, mask=row_nn)
    elif MIXING == PERMUTATIONS:
        res_ptr += first * (N * N)
        p_index = tl.arange(0, P_PAD)
        p_ok = p_index < M - 2 * N
        row_p = row_ok[:, None] & p_ok[None, :]
        raw_weight = tl.zeros((BT, P_PAD), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            part_ptr = partial_ptr + (split * step + first) * M
            part_p = part_ptr + rows[:, None] * M + 2 * N + p_index[None, :]
            raw_weight += tl.load(part_p, mask=row_p, other=0.0)
        mix_weight = raw_weight * rstd_x[:, None]
        tl.store(mix_ptr + rows[:, None] * M + 2 * N + p_index[None, :], mix_weight, mask=row_p)
        bias = tl.load(bias_ptr + 2 * N + p_index, mask=p_ok, other=0.0)
        logits = tl.load(alpha_ptr + 2) * mix_weight + bias[None, :]
        logits = tl.where(p_ok[None, :], logits, float("-inf"))
        exponential = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
        weight = exponential / tl.sum(exponential, axis=1, keep_dims=True)
        flat_index = tl.arange(0, N * N)
        table = tl.load(permutation_ptr + p_index[:, None] * (N * N) + flat_index[None, :])
        flat = tl.sum(weight[:, :, None] * table[None, :, :], axis=1)
        tl.store(res_ptr + rows[:, None] * (N * N) + flat_index[None, :], flat, mask=row_n)

    used = pre
    if CARRIED:
        carried_pre_ptr += first * N
        used = tl.load(carried_pre_ptr + coefficient_n, mask=row_n, other=0.0)
    cols = tl.arange(0, BLOCK_C)
    col_ok = cols < C
    mask = row_ok[:, None] & col_ok[None, :]
    u = tl.zeros((BT, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(N):
        pre_i = tl.sum(tl.where(n_index[None, :] == i, used, 0.0), axis=1)
        offsets = rows[:, None] * (N * C) + i * C + cols[None, :]
        x_i = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # As `collapsed`, which recompute uses.
        u = pre_i[:, None] * x_i if i == 0 else tl.fma(pre_i[:, None], x_i, u)
    rstd_h = tl.rsqrt(tl.sum(u * u, axis=1) / C + norm_eps)
    tl.store(rstd_h_ptr + rows, rstd_h, mask=row_ok)
    gain = tl.load(gain_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)
    h = scaled_input(u, rstd_h, gain)
    tl.store(h_ptr + rows[:, None] * C + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)
