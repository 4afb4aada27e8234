"""Matrix products whose weight gradient can be put off.

A zero-bubble schedule computes the input gradient of a layer first, because an earlier pipeline rank waits
for it, and the weight gradient later, when this rank would idle. Layers here put the second half into a
`DeferredWork` queue when one is open, and compute it at once otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class DeferredWork(Protocol):
    """Where weight gradients wait. Implemented by the pipeline; the model only puts work in."""

    @property
    def is_open(self) -> bool: ...

    def put(self, work: Callable[[], None]) -> None: ...


def accumulate_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add `gradient` to where the optimizer collects it: the parameter's own sink, or `.grad`."""
    sink: Callable[[Tensor], None] | None = getattr(parameter, "accumulate_gradient", None)
    if sink is not None:
        sink(gradient)
    elif parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient


def _put_off(queue: DeferredWork, weight: nn.Parameter, gradient: Callable[[], Tensor]) -> None:
    # A backward runs without autograd; what it puts off must too.
    def work() -> None:
        with torch.no_grad():
            accumulate_gradient(weight, gradient())

    queue.put(work)


class _Linear(torch.autograd.Function):
    """y_TO = x_TI @ weight_OI^T. Under an open queue the weight's gradient is delivered by the queue."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: nn.Parameter, queue: DeferredWork | None) -> Tensor:
        ctx.save_for_backward(x_TI)
        # Not among the saved tensors: hooks on those may hand out a copy, and the queue needs the parameter.
        ctx.weight, ctx.queue = weight_OI, queue
        return x_TI @ weight_OI.t()

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x_TI,) = ctx.saved_tensors
        weight_OI: nn.Parameter = ctx.weight
        queue: DeferredWork | None = ctx.queue
        grad_x = grad_TO @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        if queue is None or not queue.is_open:
            return grad_x, grad_TO.t() @ x_TI, None
        _put_off(queue, weight_OI, lambda: grad_TO.t() @ x_TI)
        return grad_x, None, None


class Linear(nn.Module):
    """A bias-free linear map over the last dimension; weight (out_features, in_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.queue: DeferredWork | None = None

    def forward(self, x: Tensor) -> Tensor:
        y_TO: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.queue)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class _GroupedLinear(torch.autograd.Function):
    """Rows x_RI sorted by expert; expert e multiplies its counts[e] rows by weight_EOI[e]^T."""

    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: nn.Parameter, counts: list[int], queue: DeferredWork | None
    ) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.weight, ctx.counts, ctx.queue = weight_EOI, counts, queue
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for x, y, weight in zip(x_RI.split(counts), y_RO.split(counts), weight_EOI, strict=True):
            if x.shape[0]:
                torch.mm(x, weight.t(), out=y)
        return y_RO

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x_RI,) = ctx.saved_tensors
        weight_EOI: nn.Parameter = ctx.weight
        counts: list[int] = ctx.counts
        queue: DeferredWork | None = ctx.queue
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_RI)
            for grad, out, weight in zip(
                grad_RO.split(counts), grad_x.split(counts), weight_EOI, strict=True
            ):
                if grad.shape[0]:
                    torch.mm(grad, weight, out=out)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None

        def weight_gradient() -> Tensor:
            grad_weight = torch.zeros_like(weight_EOI)
            for grad, x, out in zip(grad_RO.split(counts), x_RI.split(counts), grad_weight, strict=True):
                if x.shape[0]:
                    torch.mm(grad.t(), x, out=out)
            return grad_weight

        if queue is None or not queue.is_open:
            return grad_x, weight_gradient(), None, None
        _put_off(queue, weight_EOI, weight_gradient)
        return grad_x, None, None, None


class GroupedLinear(nn.Module):
    """One linear map per expert; weight (num_experts, out_features, in_features).

    `counts[e]` rows belong to expert e; rows arrive sorted by expert and sum(counts) equals their number.
    An expert without rows costs nothing and receives a zero gradient.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.queue: DeferredWork | None = None

    def forward(self, x_RI: Tensor, counts: list[int]) -> Tensor:
        y_RO: Tensor = _GroupedLinear.apply(x_RI, self.weight, counts, self.queue)
        return y_RO


def attach_queue(module: nn.Module, queue: DeferredWork | None) -> None:
    """Give every layer of `module` that can defer the queue of its pipeline chunk."""
    for layer in module.modules():
        if isinstance(layer, Linear | GroupedLinear):
            layer.queue = queue
