"""Oracle: torch's own linear map and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_dist.model.linear import GroupedLinear, Linear, WeightGradient, attach_queue
from mhc_dist.pipeline.phase import WeightQueue

KEY = (0, 0, "phase")

Backward = tuple[Tensor, Tensor]
"""Rows that a layer is given, and the gradient of what it makes of them."""


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_linear_equals_torch() -> None:
    torch.manual_seed(0)
    layer = filled(Linear(5, 3))
    x = torch.randn(2, 4, 5, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    y, want = layer(x), torch.nn.functional.linear(other, weight)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_grouped_linear_equals_a_loop_and_skips_empty_experts() -> None:
    """Oracle: one matrix product per expert; an expert without rows gets a zero gradient, not None."""
    torch.manual_seed(0)
    layer = filled(GroupedLinear(4, 5, 3))
    counts = [2, 0, 3, 1]
    x = torch.randn(6, 5, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    y = layer(x, counts)
    want = torch.cat([rows @ w.t() for rows, w in zip(other.split(counts), weight, strict=True)])
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    assert layer.weight.grad is not None
    assert layer.weight.grad[1].abs().max() == 0


def check_deferral(layer: Linear | GroupedLinear, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    queue = WeightQueue()
    attach_queue(layer, queue)
    x = torch.randn(6, 5, requires_grad=True)
    run(x).square().sum().backward()
    at_once, x_at_once = layer.weight.grad, x.grad
    layer.weight.grad, x.grad = None, None
    queue.open(KEY)
    run(x).square().sum().backward()
    queue.close()
    assert layer.weight.grad is None, "the weight gradient was to be put off"
    assert torch.equal(x.grad, x_at_once)
    assert queue.num_pending == 1
    queue.run(KEY)
    assert torch.equal(layer.weight.grad, at_once)
    assert queue.num_pending == 0


def test_deferred_weight_gradients_are_bit_equal() -> None:
    """Oracle: the same layer without an open queue."""
    torch.manual_seed(0)
    linear = filled(Linear(5, 3))
    check_deferral(linear, linear)
    grouped = filled(GroupedLinear(4, 5, 3))
    check_deferral(grouped, lambda x: grouped(x, [2, 0, 3, 1]))


def summed(
    layer: Linear | GroupedLinear, run: Callable[[Tensor], Tensor], backwards: list[Backward], *, defer: bool
) -> Tensor:
    """The fp32 sum that the optimizer reads, after some microbatches in the layer's dtype."""
    main = torch.zeros(layer.weight.shape)
    layer.weight.gradient_sum = lambda: main  # type: ignore[attr-defined]
    queue = WeightQueue()
    attach_queue(layer, queue)
    for x, grad in backwards:
        if defer:
            queue.open(KEY)
        run(x.requires_grad_()).backward(grad)
        assert layer.weight.grad is None
        if defer:
            queue.close()
            queue.run(KEY)
    return main


COUNTS = [20, 0, 30, 14]
LAYERS: list[tuple[Callable[[], Linear | GroupedLinear], list[int]]] = [
    (lambda: Linear(24, 16), [64]),
    (lambda: GroupedLinear(4, 24, 16), COUNTS),
]


@pytest.mark.parametrize(("make", "counts"), LAYERS, ids=["linear", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_gradients_are_summed_in_fp32_put_off_or_not(
    make: Callable[[], Linear | GroupedLinear], counts: list[int], dtype: torch.dtype
) -> None:
    """Oracle: the products of the very factors, summed in float64. A gradient rounded to bf16 is 1e-3 off."""
    torch.manual_seed(0)
    layer = make().to(dtype)
    filled(layer)
    run = layer if isinstance(layer, Linear) else lambda x: layer(x, counts)
    backwards = [(torch.randn(64, 24).to(dtype), torch.randn(64, 16).to(dtype)) for _ in range(8)]
    want = torch.zeros(layer.weight.shape, dtype=torch.float64).view(len(counts), 16, 24)
    for x, grad in backwards:
        for expert, (rows, grads) in enumerate(zip(x.split(counts), grad.split(counts), strict=True)):
            want[expert] += grads.double().t() @ rows.double()
    at_once = summed(layer, run, backwards, defer=False)
    put_off = summed(layer, run, backwards, defer=True)
    error = (put_off.double() - want.view(put_off.shape)).norm() / want.norm()
    assert error < 1e-6, error
    assert torch.equal(put_off, at_once)


def test_on_a_gpu_the_product_is_added_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the call that cuBLAS has for it: bf16 factors, an fp32 sum that is both read and written."""
    calls: list[tuple[Any, ...]] = []
    half = torch.bfloat16

    def addmm(given: Tensor, first: Tensor, second: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        calls.append(
            (given is out, first.shape, first.dtype, second.shape, second.dtype, out.shape, out_dtype)
        )
        return out

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    weight, main = torch.nn.Parameter(torch.empty(4, 16, 24, dtype=half)), torch.zeros(4, 16, 24)
    weight.gradient_sum = lambda: main  # type: ignore[attr-defined]
    x, grad = torch.empty(64, 24, dtype=half), torch.empty(64, 16, dtype=half)
    WeightGradient(grad, x, COUNTS).deliver(weight)
    assert calls == [
        (True, (16, rows), half, (rows, 24), half, (16, 24), torch.float32) for rows in COUNTS if rows
    ]
