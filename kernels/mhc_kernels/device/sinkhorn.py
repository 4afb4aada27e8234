# mypy: ignore-errors
# ruff: noqa: RUF005
# Device code is Triton's language: untyped, and without the unpacking of tuples that RUF005 asks for.
"""Sinkhorn on (BT, N, N) register tiles, [out, in], and its backward. Same formulas as token_last.py.

The backward keeps all 2 * ITERATIONS intermediate matrices in registers (one value per thread and step for
N = 4) and works on gradients with respect to the logarithm, so that nothing is divided by a small sum.
"""

import triton
import triton.language as tl

SMALLEST_LOG_RATIO = tl.constexpr(-80.0)


@triton.jit
def softmax_over_out(logits):
    """Softmax over axis 1 with the floor of reference.sinkhorn; also where the floor was not hit."""
    shifted = logits - tl.max(logits, axis=1, keep_dims=True)
    floored = tl.where(shifted < SMALLEST_LOG_RATIO, SMALLEST_LOG_RATIO, shifted)
    exponential = tl.exp(floored)
    return exponential / tl.sum(exponential, axis=1, keep_dims=True), shifted >= SMALLEST_LOG_RATIO


@triton.jit
def sinkhorn(logits, eps, ITERATIONS: tl.constexpr):
    start, _ = softmax_over_out(logits)
    matrix = start + eps
    matrix = matrix / (tl.sum(matrix, axis=2, keep_dims=True) + eps)
    for _step in range(ITERATIONS - 1):
        matrix = matrix / (tl.sum(matrix, axis=1, keep_dims=True) + eps)
        matrix = matrix / (tl.sum(matrix, axis=2, keep_dims=True) + eps)
    return matrix


@triton.jit
def sinkhorn_backward(logits, d_matrix, eps, ITERATIONS: tl.constexpr):
    """d logits; recomputes the forward."""
    start, not_floored = softmax_over_out(logits)
    lifted = start + eps
    matrix = lifted / (tl.sum(lifted, axis=2, keep_dims=True) + eps)
    after_rows = (matrix,)
    after_columns = (lifted,)
    for _step in tl.static_range(ITERATIONS - 1):
        matrix = matrix / (tl.sum(matrix, axis=1, keep_dims=True) + eps)
        after_columns = after_columns + (matrix,)
        matrix = matrix / (tl.sum(matrix, axis=2, keep_dims=True) + eps)
        after_rows = after_rows + (matrix,)
    gradient = d_matrix * matrix
    for step in tl.static_range(ITERATIONS - 1):
        gradient -= after_rows[ITERATIONS - 1 - step] * tl.sum(gradient, axis=2, keep_dims=True)
        gradient -= after_columns[ITERATIONS - 1 - step] * tl.sum(gradient, axis=1, keep_dims=True)
    gradient -= after_rows[0] * tl.sum(gradient, axis=2, keep_dims=True)
    gradient = gradient * (start / lifted)
    gradient -= start * tl.sum(gradient, axis=1, keep_dims=True)
    return tl.where(not_floored, gradient, 0.0)
