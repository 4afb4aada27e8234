"""Which parameters are treated alike by the optimizer.

The rule of weight decay lives here and nowhere else: matrices decay (linear, expert, router, embedding and
hyper-connection projection weights, two dimensions or more), vectors do not (norm gains, biases, scales).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

EXPERT_ATTRIBUTE = "is_expert"
"""Set to True by the model on parameters of which each rank of an expert group holds its own share."""

KEEP_FP32_ATTRIBUTE = "keep_fp32"
"""Set to True by the model on parameters that stay in fp32 when the rest is bf16."""


def is_expert(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, EXPERT_ATTRIBUTE, False))


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to vectors and scalars."""
    return parameter.ndim >= 2


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind, in model order. They share a flat buffer, so they also share a dtype."""

    is_expert: bool
    decays: bool
    dtype: torch.dtype
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def num_elements(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def __str__(self) -> str:
        kind = "expert" if self.is_expert else "dense"
        decay = "with weight decay" if self.decays else "without weight decay"
        return f"{kind} parameters {decay} in {str(self.dtype).removeprefix('torch.')}"


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[ParameterGroup]:
    """Split trainable parameters by (expert or dense, decayed or not, dtype); no group is empty.

    The order is the same on every rank that holds the same layers: dense before expert, decayed before not
    decayed, fp32 last, and model order within a group.
    """
    members: dict[tuple[bool, bool, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            key = (is_expert(parameter), decays(parameter), parameter.dtype)
            members.setdefault(key, []).append((name, parameter))
    order = sorted(members, key=lambda key: (key[0], not key[1], key[2] == torch.float32, str(key[2])))
    return [
        ParameterGroup(
            *key,
            names=tuple(name for name, _ in members[key]),
            parameters=tuple(parameter for _, parameter in members[key]),
        )
        for key in order
    ]


def cast_to_bf16(module: nn.Module) -> None:
    """Cast floating-point parameters in place, except those marked keep_fp32. Buffers keep their dtype."""
    for parameter in module.parameters():
        if parameter.is_floating_point() and not getattr(parameter, KEEP_FP32_ATTRIBUTE, False):
            parameter.data = parameter.data.to(torch.bfloat16)
