"""Oracle: torch's own linear map and autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mhc_dist.model.linear import GroupedLinear, Linear, attach_queue
from mhc_dist.pipeline.phase import WeightQueue

KEY = (0, 0, "phase")


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


def test_a_parameter_with_a_sink_never_sees_grad() -> None:
    """Oracle: the sink receives exactly what .grad would have held."""
    torch.manual_seed(0)
    layer = filled(Linear(5, 3))
    queue = WeightQueue()
    attach_queue(layer, queue)
    x = torch.randn(6, 5, requires_grad=True)
    layer(x).sum().backward()
    want = layer.weight.grad
    layer.weight.grad = None
    delivered: list[torch.Tensor] = []
    layer.weight.accumulate_gradient = delivered.append  # type: ignore[attr-defined]
    queue.open(KEY)
    layer(x).sum().backward()
    queue.close()
    queue.run(KEY)
    assert layer.weight.grad is None
    (got,) = delivered
    assert torch.equal(got, want)
