# mypy: ignore-errors
# Device code is Triton's language, not typed Python.
"""Mixture-of-experts token kernels: weighted reduce of expert outputs, and SwiGLU; forward and backward.

R rows (one per token and chosen expert, sorted by expert), T tokens, K experts per token, C channels. The
rows of a token are summed in the order of its choices: no atomics. One program per row or token.
"""

import triton
import triton.language as tl

from mhc_kernels.device.common import sigmoid


@triton.jit
def unpermute_kernel(
    rows_ptr,  # (R, C)
    weight_ptr,  # (T, K) fp32
    place_ptr,  # (T, K) int64: row of each choice
    out_ptr,  # (T, C)
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[t] = sum_k weight[t, k] rows[place[t, k]]."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place_ptr + token * K + k)
        weight = tl.load(weight_ptr + token * K + k)
        total += weight * tl.load(rows_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * C + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unpermute_backward_kernel(
    rows_ptr,  # (R, C)
    weight_ptr,  # (T, K) fp32
    place_ptr,  # (T, K) int64
    d_out_ptr,  # (T, C)
    d_rows_ptr,  # (R, C)
    d_weight_ptr,  # (T, K) fp32
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """d_rows[place[t, k]] = weight[t, k] d_out[t]; d_weight[t, k] = <rows[place[t, k]], d_out[t]>."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    d_out = tl.load(d_out_ptr + token * C + cols, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place_ptr + token * K + k)
        weight = tl.load(weight_ptr + token * K + k)
        x = tl.load(rows_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_weight_ptr + token * K + k, tl.sum(x * d_out, axis=0))
        d_x = (weight * d_out).to(d_rows_ptr.dtype.element_ty)
        tl.store(d_rows_ptr + row * C + cols, d_x, mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # (R, 2 * C): gate | up
    out_ptr,  # (R, C)
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = silu(gate) * up. Grid (R, C / BLOCK_C)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    gate = tl.load(gate_up_ptr + row * (2 * C) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * C) + C + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + cols, (gate * sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # (R, 2 * C)
    d_out_ptr,  # (R, C)
    d_gate_up_ptr,  # (R, 2 * C)
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Recomputes silu(gate); only gate | up is kept from the forward."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    gate = tl.load(gate_up_ptr + row * (2 * C) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * C) + C + cols, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + row * C + cols, mask=mask, other=0.0).to(tl.float32)
    gated = sigmoid(gate)
    silu = gate * gated
    d_gate = d_out * up * (gated + silu * (1.0 - gated))
    d_up = d_out * silu
    element = d_gate_up_ptr.dtype.element_ty
    tl.store(d_gate_up_ptr + row * (2 * C) + cols, d_gate.to(element), mask=mask)
    tl.store(d_gate_up_ptr + row * (2 * C) + C + cols, d_up.to(element), mask=mask)
