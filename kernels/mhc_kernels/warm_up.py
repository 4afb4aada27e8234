"""Use everything once that compiles at first use, before anyone waits for it.

`compiled` compiles its formulas and `triton` its kernels when they first meet a shape: seconds to minutes,
inside what looks like the first training step. A run calls `warm_up` with its shapes before that step, and
tells its watchdog `may_take_seconds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mhc_kernels import tokens
from mhc_kernels.spec import Connection, Kept, SeamBackend

MAY_TAKE_SECONDS = {"compiled": 900.0, "triton": 900.0}
"""Upper bounds, for a busy machine with an empty compiler cache. `compiled` took 5 s on a quiet machine and 2
minutes on a busy one."""


def may_take_seconds(backend: SeamBackend) -> float:
    """How long `warm_up` may take; 0 for a backend that compiles nothing."""
    return MAY_TAKE_SECONDS.get(backend.name, 0.0)


def warm_up(
    backend: SeamBackend,
    block: Sequence[Connection],
    num_tokens: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """open, cross, close and collapse, forward and backward, of every connection of a block, and the block's
    recompute, on streams of ones.

    block: with the run's own parameters, since `variant` tells of them; they get no gradients.
    """
    n = block[0].spec.num_streams

    def ones(*shape: int, into: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=into, device=device, requires_grad=True)

    x_TNC = ones(num_tokens, n, channels, into=dtype)
    kept = []
    for connection in block:
        with torch.enable_grad():
            first = backend.open(x_TNC, connection)
            carried = first.pre_TN if connection.spec.shifted_pre else None
            second = backend.cross(
                first.streams_TNC, first.h_TC, first.post_TN, first.res_TNN, connection, carried
            )
            end_TNC = backend.close(second.streams_TNC, second.h_TC, second.post_TN, second.res_TNN)
            collapsed_TC = backend.collapse(end_TNC, ones(num_tokens, n))
            torch.autograd.grad(collapsed_TC.float().sum(), x_TNC)
        kept.append(
            Kept(
                second.pre_TN.detach(),
                second.rstd_T,
                connection.gain_C.detach(),
                second.post_TN.detach(),
                None if second.res_TNN is None else second.res_TNN.detach(),
                second.h_TC.detach(),
            )
        )
    backend.recompute_block(x_TNC.detach(), kept)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def variant(block: Sequence[Connection]) -> tuple[object, ...]:
    """Equal for blocks that compile alike: their length, and of every parameter its dtype and whether Triton
    may take its address for a multiple of 16 bytes. In the flat buffers of an optimizer it may be anywhere.
    """
    return tuple(
        (parameter.dtype, parameter.data_ptr() % 16 == 0)
        for connection in block
        for parameter in (connection.phi_MD, connection.alpha_3, connection.bias_M, connection.gain_C)
    )


def warm_up_tokens(
    num_tokens: int,
    channels: int,
    num_choices: int,
    widths: Iterable[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Rows to `num_choices` experts a token and back, and SwiGLU of `widths`, forward and backward.

    How many rows arrive differs from step to step, but no kernel is compiled for their number.
    """
    choices_K = torch.arange(num_choices, device=device)
    order = tokens.order_by_expert(choices_K.expand(num_tokens, -1).contiguous(), num_choices)
    x_TC = torch.ones(num_tokens, channels, dtype=dtype, device=device, requires_grad=True)
    weight_TK = torch.ones(num_tokens, num_choices, device=device, requires_grad=True)
    with torch.enable_grad():
        y_TC = tokens.unpermute(tokens.permute(x_TC, order), weight_TK, order)
        torch.autograd.grad(y_TC.float().sum(), (x_TC, weight_TK))
        for width in widths:
            gate_up_TD = torch.ones(num_tokens, 2 * width, dtype=dtype, device=device, requires_grad=True)
            torch.autograd.grad(tokens.swiglu(gate_up_TD).float().sum(), gate_up_TD)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
