"""Triton token kernels, interpreted, against torch under autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from mhc_kernels import interpreted, tokens


def test_unpermute_kernels() -> None:
    """Oracle: the CPU path of the same function, which is tested against index_add."""
    generator = torch.Generator().manual_seed(3)
    expert_TK = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(7)])
    order = tokens.order_by_expert(expert_TK, 8)
    rows_RC = torch.randn(21, 48, requires_grad=True)
    weight_TK = torch.rand(7, 3, requires_grad=True)
    theirs = tokens.unpermute(rows_RC, weight_TK, order)
    d_out_TC = torch.randn(7, 48)
    with interpreted.counted_traffic(), torch.no_grad():
        ours = tokens.launch_unpermute(rows_RC, weight_TK, order.place_TK)
        gradients = tokens.launch_unpermute_backward(rows_RC, weight_TK, order.place_TK, d_out_TC)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients, torch.autograd.grad(theirs, (rows_RC, weight_TK), d_out_TC), strict=True):
        torch.testing.assert_close(a, b)


def test_swiglu_kernels() -> None:
    """Oracle: silu(gate) * up under autograd."""
    gate_up_RD = torch.randn(4, 2 * 40, requires_grad=True)
    gate, up = gate_up_RD.chunk(2, dim=1)
    theirs = functional.silu(gate) * up
    d_out_RD = torch.randn(4, 40)
    with interpreted.counted_traffic():
        ours = tokens._SwiGlu.apply(gate_up_RD)
        (gradient,) = torch.autograd.grad(ours, gate_up_RD, d_out_RD)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, gate_up_RD, d_out_RD)[0])


def test_permute_sums_gradients_without_atomics() -> None:
    """Oracle: index_select under autograd; the counter refuses atomics."""
    generator = torch.Generator().manual_seed(3)
    expert_TK = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(5)])
    order = tokens.order_by_expert(expert_TK, 8)
    x_TC, d_rows_RC = torch.randn(5, 48, requires_grad=True), torch.randn(15, 48)
    with interpreted.counted_traffic():
        ours = tokens._Permute.apply(x_TC, order.token_R, order.place_TK)
        (gradient,) = torch.autograd.grad(ours, x_TC, d_rows_RC)
    theirs = x_TC.index_select(0, order.token_R)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, x_TC, d_rows_RC)[0])
