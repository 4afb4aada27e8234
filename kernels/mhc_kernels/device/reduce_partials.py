# mypy: ignore-errors
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""B3: sums of partial results in a fixed order: dphi and dgain over token splits, dpost and dres over channel
blocks, dalpha and dbias over programs.

Two shapes: few partials of many elements, one after the other; and many partials of few elements, where that
would be one program that waits for memory thousands of times."""

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
    # 64 bits: the partial dres of a long batch have more than 2^31 elements.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offsets < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(count):
        total += tl.load(partial_ptr + offsets, mask=ok, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + offsets, total, mask=ok)


@triton.jit(do_not_specialize=["count"])
def reduce_rows_kernel(
    partial_ptr,  # (COUNT, SIZE) fp32
    out_ptr,  # (COUNT / ROWS, SIZE) fp32
    count,
    size,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[g] = sum of the g-th ROWS partials. Grid (SIZE / BLOCK, COUNT / ROWS)."""
    group = tl.program_id(1).to(tl.int64)
    rows, cols = tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = (rows < count - group * ROWS)[:, None] & (cols < size)[None, :]
    tile_ptr = partial_ptr + group * ROWS * size
    tile = tl.load(tile_ptr + rows[:, None] * size + cols[None, :], mask=ok, other=0.0)
    tl.store(out_ptr + group * size + cols, tl.sum(tile, axis=0), mask=cols < size)
