"""The norm of the gradient of the whole model, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.optim.reduction import Clock


class GradientNorm(NamedTuple):
    """The same on all ranks, but for the seconds that this one waited for the others."""

    norm: float
    losses_finite: bool
    waited_seconds: float


def norm_of_whole_model(
    gradients: Sequence[Tensor], losses: Sequence[Tensor], data_size: int, clock: Clock
) -> GradientNorm:
    """Norm of the mean gradient of all parameters of all stages, collective over the world.

    `gradients` are this rank's partitions of the sums over `data_size` data ranks; partitions overlap
    nowhere. On the way it learns whether all `losses` of all ranks are finite.
    """
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    squares = torch.stack(norms).double().square().sum()
    bad_losses = squares.new_zeros(())
    for loss in losses:
        bad_losses += ~loss.isfinite().all()
    facts = torch.stack([squares, bad_losses])
    # The one point of a step where every rank waits for the slowest of all. The host of a device gets here
    # long before it, so its own time would count this rank's backward as waiting.
    marks = [clock.mark()]
    dist.all_reduce(facts)
    marks.append(clock.mark())
    total, num_bad_losses = facts.tolist()
    began, ended = clock.seconds(marks)
    return GradientNorm(math.sqrt(total) / data_size, num_bad_losses == 0, ended - began)
