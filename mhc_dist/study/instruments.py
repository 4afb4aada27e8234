"""A model's gains as the study tells them: those that `observe` measures live, with every layer by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_dist.model.hyper_connection import TapeHolder, attach_holder
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.observe.stability import StabilityProbe, StageFigures, amax_gain

GAINS = ("forward_gain", "backward_gain", "single_forward_gain", "single_backward_gain")
"""What a record of a measured step tells: of the whole model, and the largest of a sublayer."""


def probe_by_layer(model: LanguageModel, every: int) -> StabilityProbe:
    """Every layer is a chunk of its own to the probe, so that gains over depth can be told."""
    holders = {index: TapeHolder() for index in range(len(model.layers))}
    for index, layer in enumerate(model.layers):
        attach_holder(layer, holders[index])
    return StabilityProbe(holders, every)


def gains_of(figures: StageFigures) -> dict[str, float]:
    """Composite gains of the whole model, the largest of a single sublayer, the largest residuals."""
    singles = [one for chunk in figures.chunks for one in chunk.sublayers]
    return {
        "forward_gain": figures.gain.forward,
        "backward_gain": figures.gain.backward,
        "single_forward_gain": max(one.gain.forward for one in singles),
        "single_backward_gain": max(one.gain.backward for one in singles),
        "row_residual": figures.residual.rows,
        "column_residual": figures.residual.columns,
    }


def gains_over_depth(figures: StageFigures) -> dict[str, list[float]]:
    """Gain of the product of the first 1, 2, ... layers."""
    product_SNN: Tensor | None = None
    gains = []
    for chunk in figures.chunks:
        layer_SNN = torch.tensor(chunk.product, dtype=torch.float64)
        product_SNN = layer_SNN if product_SNN is None else layer_SNN @ product_SNN
        gains.append(amax_gain(product_SNN))
    return {"forward": [gain.forward for gain in gains], "backward": [gain.backward for gain in gains]}
