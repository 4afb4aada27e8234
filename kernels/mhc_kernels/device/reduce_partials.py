# mypy: ignore-errors
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""B3: sums of partial results in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def reduce_partials_kernel(
    partial_ptr,  # (COUNT, SIZE) fp32
    out_ptr,  # (SIZE,) fp32
    count,
    size,
    BLOCK: tl.constexpr,
):
    """out = sum over the first dimension, one partial after the other. Grid (SIZE / BLOCK,)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(count):
        total += tl.load(partial_ptr + k * size + offsets, mask=ok, other=0.0)
    tl.store(out_ptr + offsets, total, mask=ok)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_dots_kernel(
    dots_ptr,  # (BLOCKS, K, T) fp32
    out_ptr,  # (T, K) fp32
    num_tokens,
    BLOCKS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BT: tl.constexpr,
):
    """dpost and dres: the sum over channel blocks, turned from (K, T) to (T, K). Grid (T / BT,)."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    k_index = tl.arange(0, K_PAD)
    mask = (k_index < K)[:, None] & (rows < num_tokens)[None, :]
    total = tl.zeros((K_PAD, BT), dtype=tl.float32)
    for block in range(BLOCKS):
        block_rows = (block * K + k_index[:, None]) * num_tokens.to(tl.int64) + rows[None, :]
        total += tl.load(dots_ptr + block_rows, mask=mask, other=0.0)
    tl.store(out_ptr + rows[None, :] * K + k_index[:, None], total, mask=mask)
