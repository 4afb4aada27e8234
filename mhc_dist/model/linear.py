"""Matrix products whose weight gradient can be put off.

A zero-bubble schedule computes the input gradient of a layer first, because an earlier pipeline rank waits
for it, and the weight gradient later, when this rank would idle. Layers here put the second half into a
`DeferredWork` queue when one is open, and compute it at once otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class DeferredWork(Protocol):
    """Where weight gradients wait. Implemented by the pipeline; the model only puts work in."""

    @property
    def is_open(self) -> bool: ...

    def put(self, work: Callable[[], None]) -> None: ...


class WeightGradient(NamedTuple):
    """grad^T x, for every expert of its own rows (R of them, `counts[e]` of expert e) or for all at once.

    It goes straight into the fp32 sum over microbatches where the parameter has one (its attribute
    `gradient_sum`, a function that returns it), and then no bit of it is rounded to the parameter's dtype.
    """

    grad_RO: Tensor
    x_RI: Tensor
    counts: Sequence[int]

    def deliver(self, weight: nn.Parameter) -> None:
        """Add it where the optimizer collects the gradients of `weight`: its sum, or `.grad`."""
        gradient_sum: Callable[[], Tensor] | None = getattr(weight, "gradient_sum", None)
        if gradient_sum is not None:
            for grad, x, sum_OI in self._by_expert(gradient_sum()):
                if x.shape[0]:
                    _add_product(sum_OI, grad, x)
        elif weight.grad is None:
            weight.grad = self.alone(weight)
        else:
            weight.grad += self.alone(weight)

    def alone(self, weight: Tensor) -> Tensor:
        """A tensor like `weight`, in its dtype; zero for experts without rows."""
        gradient = torch.empty_like(weight)
        for grad, x, out_OI in self._by_expert(gradient):
            if x.shape[0]:
                torch.mm(grad.t(), x, out=out_OI)
            else:
                out_OI.zero_()
        return gradient

    def _by_expert(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of the gradient, rows of x, and the matrix of each expert."""
        counts = list(self.counts)
        weight_EOI = weight.view(len(counts), *weight.shape[-2:])
        return zip(self.grad_RO.split(counts), self.x_RI.split(counts), weight_EOI, strict=True)


def _add_product(sum_OI: Tensor, grad_RO: Tensor, x_RI: Tensor) -> None:
    """sum += grad^T x; the product of rounded factors is added up in fp32 and stays there."""
    grad_OR = grad_RO.t()
    if not sum_OI.is_cuda:
        # There is no product of bf16 factors with an fp32 result; that of their fp32 values is the same. As
        # a sum of its own it is more exact than the blocks of rows that addmm adds to a large sum one by one.
        sum_OI += grad_OR.to(sum_OI.dtype) @ x_RI.to(sum_OI.dtype)
    elif grad_RO.dtype is sum_OI.dtype:
        sum_OI.addmm_(grad_OR, x_RI)
    else:
        torch.addmm(sum_OI, grad_OR, x_RI, out_dtype=sum_OI.dtype, out=sum_OI)


def _backward_of_weight(
    queue: DeferredWork | None, weight: nn.Parameter, gradient: WeightGradient
) -> Tensor | None:
    """What a backward returns to autograd for `weight`: nothing, if it is put off or has gone to its sum."""
    if queue is not None and queue.is_open:

        def work() -> None:
            # A backward runs without autograd; what it puts off must too.
            with torch.no_grad():
                gradient.deliver(weight)

        queue.put(work)
        return None
    if hasattr(weight, "gradient_sum"):
        gradient.deliver(weight)
        return None
    return gradient.alone(weight)


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
        grad_x = grad_TO @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        gradient = WeightGradient(grad_TO, x_TI, [x_TI.shape[0]])
        return grad_x, _backward_of_weight(ctx.queue, weight_OI, gradient), None


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
        gradient = WeightGradient(grad_RO, x_RI, counts)
        return grad_x, _backward_of_weight(ctx.queue, weight_EOI, gradient), None, None


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
