"""Who gets a token's rows in a bench.

An untrained router prefers some experts by a quarter of the rows and more, differently on every batch; a
trained one is kept balanced. Even routing sends equally many rows to every expert: the case that balancing
aims at, that the planner assumes, and in which no rank waits for another's experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mhc_dist.model.moe import Router, Routing

Rule = Literal["even", "untrained"]


def spread_evenly(module: nn.Module) -> None:
    """From now on routers in it send slot k of token t to expert t * K + k, counted round; weights stay."""
    for child in module.modules():
        if isinstance(child, Router):
            child.register_forward_hook(_evenly)


def _evenly(router: Router, inputs: Any, routing: Routing) -> Routing:
    slots = torch.arange(routing.expert_TK.numel(), device=routing.expert_TK.device)
    even_TK = (slots % router.bias_E.numel()).view_as(routing.expert_TK)
    return routing._replace(expert_TK=even_TK)
