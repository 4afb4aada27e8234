"""Loss-free balancing over data ranks: every copy of a router moves its bias by the load of all tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from mhc_dist.model.moe import Router


@torch.no_grad()
def balance_routers(routers: Iterable[Router], rate: float, group: dist.ProcessGroup) -> list[float]:
    """Sum loads over `group` (all data ranks of a stage), move biases, start counting anew.

    Loads are integers, so every topology moves the same biases. Returns each router's largest load over its
    mean load, in order (1 is perfect balance).
    """
    routers = list(routers)
    if not routers:
        return []
    load_RE = torch.stack([router.load_E for router in routers])
    dist.all_reduce(load_RE, group=group)
    for router, load_E in zip(routers, load_RE, strict=True):
        router.balance(load_E, rate)
    ratios: list[float] = (load_RE.amax(1) / load_RE.double().mean(1).clamp_min(1e-9)).tolist()
    return ratios
