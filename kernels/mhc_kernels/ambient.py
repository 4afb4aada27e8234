"""Seams do not depend on what happens to be current: the GPU that is selected, an autocast region. The one
thing that they cannot do without, a backward that nobody differentiates, is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_gpu(launching: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Triton launches on the current GPU and its current stream: make that the GPU of the first argument.
    Nothing happens for tensors on CPUs."""

    @functools.wraps(launching)
    def call(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(tensor):
            return launching(tensor, *args, **kwargs)

    return call


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Coefficients are fp32 whatever the caller's autocast region says: it would round the projection."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kind = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "meta")
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return call


def without_second_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward by hand has no backward of its own. Autograd's grad mode tells when one is wanted. (torch's
    `once_differentiable` complains when somebody gets there, and is silent when asked for the gradients of
    inputs that are reached by another way too.)"""

    @functools.wraps(backward)
    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                "create_graph=True: a seam has no second derivatives but with kernel backend `reference`"
            )
        return backward(*args)

    return call
