"""AdamW with decoupled weight decay over a few flat fp32 tensors.

torch's fused kernel behind the two attributes DeepSpeed asks of an optimizer, `param_groups` and `state`. Not
torch.optim.AdamW itself: constructing any torch.optim.Optimizer imports torch's compiler, two seconds of
processor time in every process of every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class FlatAdamW:
    """One tensor per parameter group; a group is a dict with `params`, `lr` and `weight_decay`.

    Step t of master w with gradient g (Loshchilov and Hutter, "Decoupled Weight Decay Regularization"):

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = (1 - lr decay) w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
    """

    def __init__(self, param_groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        self.param_groups = param_groups
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.betas, self.eps = betas, eps

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """`step` (fp32 scalar), `exp_avg` and `exp_avg_sq` (like `master`); zeros before the first step."""
        if master not in self.state:
            self.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }
        return self.state[master]

    @torch.no_grad()
    def step(self) -> None:
        """Update every group's tensor from its `.grad`, which must be set."""
        for group in self.param_groups:
            masters: Sequence[Tensor] = group["params"]
            states = [self.state_of(master) for master in masters]
            gradients = [master.grad for master in masters]
            assert all(gradient is not None for gradient in gradients), "step without gradients"
            adamw(
                list(masters),
                gradients,  # type: ignore[arg-type]  # none is None, see above
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )
