"""SwiGLU feed-forward: the dense layers and the shared experts."""

from __future__ import annotations

from mhc_kernels import tokens
from torch import Tensor, nn
from torch.nn import functional

from mhc_dist.model.linear import Linear


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a [gate | up] tensor; halves the last dimension. On GPUs one kernel each way, which
    keeps nothing but its argument."""
    if gate_up.is_cuda:
        return tokens.swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class FeedForward(nn.Module):
    """down(silu(gate(h)) * up(h)); gate and up are one matrix (2 * width, hidden_size)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * width)
        self.down = Linear(width, hidden_size)

    def forward(self, h_TC: Tensor) -> Tensor:
        y_TC: Tensor = self.down(swiglu(self.gate_up(h_TC)))
        return y_TC
