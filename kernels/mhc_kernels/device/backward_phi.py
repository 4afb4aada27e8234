# mypy: ignore-errors
# Device code is Triton's language, not typed Python.
"""B2b: dphi, where `backward_apply` has no registers for it (n = 8).

Grid (N * C / BC, TOKEN_SPLITS). The streams are one matrix (T, N * C) here; a program owns BC of its columns
and walks its tokens. Partial sums are stored per token split and added in order by reduce_partials.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
def backward_phi_kernel(
    x_ptr,  # (T, N*C) x'
    d_projection_ptr,  # (T, M) fp32
    d_phi_ptr,  # (TOKEN_SPLITS, M, N*C) fp32
    num_tokens,
    tokens_per_split,
    D: tl.constexpr,  # N*C
    M: tl.constexpr,
    M_PAD: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """With ACCUMULATE the sums go on from what the chunk of tokens before left."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    col_ok = cols < D
    token_split = tl.program_id(1)
    coefficient = tl.arange(0, M_PAD)
    coefficient_ok = coefficient < M
    phi_offsets = coefficient[:, None] * D + cols[None, :]
    phi_mask = coefficient_ok[:, None] & col_ok[None, :]
    d_phi_tile = d_phi_ptr + token_split.to(tl.int64) * (M * D) + phi_offsets
    if ACCUMULATE:
        d_phi = tl.trans(tl.load(d_phi_tile, mask=phi_mask, other=0.0))
    else:
        d_phi = tl.zeros((BC, M_PAD), dtype=tl.float32)
    rows = tl.arange(0, BT)
    split_first = token_split.to(tl.int64) * tokens_per_split
    split_size = tl.minimum(tokens_per_split, num_tokens - token_split * tokens_per_split)
    for offset in range(0, split_size, BT):
        first = split_first + offset
        row_ok = rows < split_size - offset
        x_offsets = rows[:, None] * D + cols[None, :]
        x = tl.load(x_ptr + first * D + x_offsets, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
        d_projection = tl.load(
            d_projection_ptr + first * M + rows[:, None] * M + coefficient[None, :],
            mask=row_ok[:, None] & coefficient_ok[None, :],
            other=0.0,
        )
        d_phi = tl.dot(tl.trans(x.to(tl.float32)), d_projection, d_phi, input_precision=PRECISION)
    tl.store(d_phi_tile, tl.trans(d_phi), mask=phi_mask)
