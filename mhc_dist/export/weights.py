"""Where an export takes tensors from: a model's weights under their logical names.

Logical names are those of `LanguageModel`, except that experts stand one by one, as checkpoints keep them:
`layers.3.feed_forward.experts.5.gate_up.weight` is row 5 of the stacked `...experts.gate_up.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.model.language_model import LanguageModel

EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>.*)")


class Weights(Protocol):
    """Tensors on the CPU by logical name, loaded when asked for: a model need not fit into memory at once."""

    def load_tensor(self, name: str) -> Tensor:
        """Raises ValueError when there is no such tensor."""
        ...


class StateDictWeights:
    """The weights of a `LanguageModel.state_dict()`."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def load_tensor(self, name: str) -> Tensor:
        if name in self._state:
            return self._state[name].detach().cpu()
        found = EXPERT.fullmatch(name)
        stacked = None if found is None else self._state.get(f"{found['experts']}.{found['leaf']}")
        if found is None or stacked is None:
            raise ValueError(f"the model has no tensor {name}: it was built from another configuration")
        return stacked[int(found["number"])].detach().cpu()


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logical names to `LanguageModel`'s: the experts of a layer become one tensor, in their order."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := EXPERT.fullmatch(name):
            experts.setdefault(f"{found['experts']}.{found['leaf']}", {})[int(found["number"])] = tensor
        else:
            state[name] = tensor
    for name, by_number in experts.items():
        state[name] = torch.stack([by_number[number] for number in range(len(by_number))])
    return state


def whole_state(weights: Weights, config: RunConfig) -> dict[str, Tensor]:
    """All of a model's tensors under `LanguageModel`'s names."""
    with torch.device("meta"):
        expected = LanguageModel(config, make_backend("reference")).state_dict()
    state: dict[str, Tensor] = {}
    for name, shaped in expected.items():
        experts, is_stacked, leaf = name.partition(".experts.")
        if is_stacked:
            rows = (weights.load_tensor(f"{experts}.experts.{e}.{leaf}") for e in range(len(shaped)))
            state[name] = torch.stack(list(rows))
        else:
            state[name] = weights.load_tensor(name)
        if state[name].shape != shaped.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(shaped.shape)}"
            )
    return state


def build_model(config: RunConfig, state: Mapping[str, Tensor]) -> LanguageModel:
    """The model on one CPU with these weights, in fp32, ready to be asked. Takes no gradients.

    Raises ValueError when the tensors are not those of the configuration.
    """
    model = LanguageModel(config, make_backend("cpu"))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the tensors do not fit the configuration: {error}") from error
    return model.requires_grad_(False).eval()
