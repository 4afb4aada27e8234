"""Every parameter's fp32 gradient: a view of a flat buffer, and the hook that fills it from autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mhc_dist.optim.parameter_groups import ParameterGroup


def connect_parameters(
    groups: Sequence[ParameterGroup], slices: Sequence[Sequence[Tensor]], is_reduced: Callable[[], bool]
) -> dict[nn.Parameter, Tensor]:
    """Hook every parameter of `groups[i]` to its slice of the flat fp32 gradients, in `slices[i]`.

    Each gets the attribute `gradient_sum()`, which asserts that the sums are still open: not `is_reduced()`.
    """
    main_gradients: dict[nn.Parameter, Tensor] = {}
    for group, gradients in zip(groups, slices, strict=True):
        for parameter, gradient in zip(group.parameters, gradients, strict=True):
            main = gradient.view(parameter.shape)
            main_gradients[parameter] = main
            open_sum = _opener(main, is_reduced)
            parameter.gradient_sum = open_sum  # type: ignore[attr-defined]

            def move(parameter: Tensor, open_sum: Callable[[], Tensor] = open_sum) -> None:
                # None where the weight gradient went there already, or was put off: autograd visits the
                # parameter all the same.
                if parameter.grad is not None:
                    with torch.no_grad():
                        open_sum().add_(parameter.grad)
                    parameter.grad = None

            parameter.register_post_accumulate_grad_hook(move)
    return main_gradients


def _opener(main: Tensor, is_reduced: Callable[[], bool]) -> Callable[[], Tensor]:
    def open_sum() -> Tensor:
        assert not is_reduced(), "a gradient arrived after reduce_gradients and would be lost"
        return main

    return open_sum
