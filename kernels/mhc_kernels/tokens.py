"""Token movement of a mixture of experts: permute, unpermute with weighted reduce, SwiGLU, grouped matmul.

T tokens choose K experts each; R = T * K rows are sorted by expert. What was written and what was left to
torch was decided by measurement (kernels/README.md): on CPUs unpermute is by hand, permute, SwiGLU and the
grouped product are torch's. On GPUs unpermute, SwiGLU and the backward of permute are Triton kernels, so that
no sum depends on the order in which atomics arrive.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.tiles import SWIGLU_TILE, token_row_tile

BLOCK_ROWS = 256
"""Rows handled at a time on CPUs, so that temporaries stay in the cache."""


class Order(NamedTuple):
    """Where the rows come from and go to.

    token_R (R,) int64   token of each row, rows sorted by expert and, within an expert, by token
    place_TK (T, K) int64  row of each token's k-th choice
    rows_per_expert_E (E,) int64
    """

    token_R: Tensor
    place_TK: Tensor
    rows_per_expert_E: Tensor


def order_by_expert(expert_TK: Tensor, num_experts: int) -> Order:
    """Sort the choices (T, K) by expert; equal experts keep the order of tokens, so the order is a function
    of the choices alone.

    The host never waits for a GPU here. So an expert that does not exist is a ValueError on CPUs only; a GPU
    stops with the device-side assertion of the scatter.
    """
    if expert_TK.dim() != 2 or expert_TK.dtype != torch.int64:
        raise ValueError(
            f"expert_TK has shape {tuple(expert_TK.shape)} and dtype {expert_TK.dtype}: (tokens, choices) of "
            "torch.int64 is needed"
        )
    if expert_TK.device.type == "cpu" and expert_TK.numel():
        first, last = (bound.item() for bound in expert_TK.aminmax())
        if first < 0 or last >= num_experts:
            named = first if first < 0 else last
            raise ValueError(
                f"expert_TK names expert {named}: with num_experts={num_experts} 0 to {num_experts - 1} exist"
            )
    num_choices = expert_TK.shape[1]
    flat_R = expert_TK.flatten()
    source_R = flat_R.argsort(stable=True)
    place_R = torch.empty_like(source_R)
    place_R[source_R] = torch.arange(source_R.numel(), device=source_R.device)
    # Not bincount: its result is as long as the largest value says, and the host would wait to learn it.
    counts_E = flat_R.new_zeros(num_experts).scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return Order(source_R // num_choices, place_R.view_as(expert_TK), counts_E)


def permute(x_TC: Tensor, order: Order) -> Tensor:
    """Rows of the chosen experts, (R, C)."""
    _check_rows("x_TC", x_TC, order.place_TK.shape[0], order)
    if x_TC.is_cuda:
        return cast(Tensor, _Permute.apply(x_TC, order.token_R, order.place_TK))
    return x_TC.index_select(0, order.token_R)


def unpermute(rows_RC: Tensor, weight_TK: Tensor, order: Order) -> Tensor:
    """sum_k weight[t, k] rows[place[t, k]], (T, C) in the rows' dtype; the sum is fp32, in order of k."""
    _check_rows("rows_RC", rows_RC, order.token_R.numel(), order)
    if weight_TK.shape != order.place_TK.shape:
        raise ValueError(
            f"weight_TK has shape {tuple(weight_TK.shape)}: {tuple(order.place_TK.shape)} is needed"
        )
    if not weight_TK.is_floating_point():
        raise ValueError(f"weight_TK has dtype {weight_TK.dtype}: a floating dtype is needed")
    _check_device("weight_TK", weight_TK, rows_RC)
    return cast(Tensor, _Unpermute.apply(rows_RC, weight_TK, order.token_R, order.place_TK))


def swiglu(gate_up_RD: Tensor) -> Tensor:
    """silu(gate) * up of (R, 2 * D) = gate | up."""
    if gate_up_RD.dim() != 2 or gate_up_RD.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up_RD.shape)}: (rows, 2 * width) is needed")
    if gate_up_RD.is_cuda:
        return cast(Tensor, _SwiGlu.apply(gate_up_RD.contiguous()))
    gate, up = gate_up_RD.chunk(2, dim=1)
    return functional.silu(gate) * up


def grouped_matmul(rows_RC: Tensor, weight_ECD: Tensor, rows_per_expert_E: Tensor) -> Tensor:
    """rows of expert e times weight[e], (R, D): torch's grouped product, on CPUs and GPUs."""
    if weight_ECD.dim() != 3 or rows_RC.dim() != 2 or rows_RC.shape[1] != weight_ECD.shape[1]:
        raise ValueError(
            f"rows_RC has shape {tuple(rows_RC.shape)} and weight_ECD {tuple(weight_ECD.shape)}: "
            "(rows, channels) and (experts, channels, width) are needed"
        )
    if rows_per_expert_E.shape != weight_ECD.shape[:1]:
        raise ValueError(
            f"rows_per_expert_E has shape {tuple(rows_per_expert_E.shape)}: one number for each of the "
            f"{len(weight_ECD)} experts of weight_ECD is needed"
        )
    for name, tensor in (("weight_ECD", weight_ECD), ("rows_per_expert_E", rows_per_expert_E)):
        _check_device(name, tensor, rows_RC)
    if weight_ECD.dtype != rows_RC.dtype:
        raise ValueError(
            f"weight_ECD has dtype {weight_ECD.dtype}: that of rows_RC, {rows_RC.dtype}, is needed"
        )
    ends_E = rows_per_expert_E.cumsum(0).to(torch.int32)
    return functional.grouped_mm(rows_RC, weight_ECD, offs=ends_E)


def _check_rows(name: str, tensor: Tensor, rows: int, order: Order) -> None:
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: ({rows}, channels) is needed")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: a floating dtype is needed")
    if tensor.device != order.token_R.device:
        raise ValueError(
            f"{name} is on {tensor.device}, order on {order.token_R.device}: one device is needed"
        )


def _check_device(name: str, tensor: Tensor, rows_RC: Tensor) -> None:
    if tensor.device != rows_RC.device:
        raise ValueError(f"{name} is on {tensor.device}, rows_RC on {rows_RC.device}: one device is needed")


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class _Permute(torch.autograd.Function):
    """On GPUs: index_select's own backward adds atomically, in an order that changes from run to run."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TC.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """A token's gradient is the sum over its rows: gathered, not scattered."""
        (place_TK,) = ctx.saved_tensors
        ones_TK = torch.ones(place_TK.shape, device=place_TK.device)
        return launch_unpermute(grads[0].contiguous(), ones_TK, place_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, weight_TK: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RC, weight_TK, token_R, place_TK)
        if rows_RC.is_cuda:
            return launch_unpermute(rows_RC.contiguous(), weight_TK.float().contiguous(), place_TK)
        num_tokens, num_choices = place_TK.shape
        out_TC = rows_RC.new_empty(num_tokens, rows_RC.shape[1])
        for block in _blocks(num_tokens, BLOCK_ROWS // num_choices or 1):
            rows = rows_RC.index_select(0, place_TK[block].flatten()).to(weight_TK.dtype)
            rows = rows.view(-1, num_choices, rows_RC.shape[1])
            out_TC[block] = torch.bmm(weight_TK[block].unsqueeze(1), rows).squeeze(1)
        return out_TC

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows_RC, weight_TK, token_R, place_TK = ctx.saved_tensors
        d_out_TC = grads[0].contiguous()
        if d_out_TC.is_cuda:
            d_rows_RC, d_weight_TK = launch_unpermute_backward(
                rows_RC.contiguous(), weight_TK.float().contiguous(), place_TK, d_out_TC
            )
            return d_rows_RC, d_weight_TK.to(weight_TK.dtype), None, None
        d_rows_RC = torch.empty_like(rows_RC)
        weight_R = torch.empty_like(weight_TK).flatten()
        weight_R[place_TK.flatten()] = weight_TK.flatten()
        d_weight_R = torch.empty_like(weight_R)
        for block in _blocks(token_R.numel(), BLOCK_ROWS):
            d_out = d_out_TC.index_select(0, token_R[block]).to(weight_TK.dtype)
            d_weight_R[block] = torch.linalg.vecdot(d_out, rows_RC[block].to(weight_TK.dtype))
            d_rows_RC[block] = d_out.mul_(weight_R[block].unsqueeze(1))
        return d_rows_RC, d_weight_R[place_TK], None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RD: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RD)
        return launch_swiglu(gate_up_RD)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up_RD,) = ctx.saved_tensors
        return launch_swiglu_backward(gate_up_RD, grads[0].contiguous())


@on_its_gpu
def launch_unpermute(rows_RC: Tensor, weight_TK: Tensor, place_TK: Tensor) -> Tensor:
    from mhc_kernels.device.tokens import unpermute_kernel

    (num_tokens, num_choices), channels = place_TK.shape, rows_RC.shape[1]
    tile = token_row_tile(channels)
    out_TC = rows_RC.new_empty(num_tokens, channels)
    if num_tokens:
        unpermute_kernel[(num_tokens,)](
            rows_RC,
            weight_TK,
            place_TK,
            out_TC,
            C=channels,
            K=num_choices,
            BLOCK_C=tile.channels,
            num_warps=tile.num_warps,
        )
    return out_TC


@on_its_gpu
def launch_unpermute_backward(
    rows_RC: Tensor, weight_TK: Tensor, place_TK: Tensor, d_out_TC: Tensor
) -> tuple[Tensor, Tensor]:
    from mhc_kernels.device.tokens import unpermute_backward_kernel

    (num_tokens, num_choices), channels = place_TK.shape, rows_RC.shape[1]
    tile = token_row_tile(channels)
    d_rows_RC, d_weight_TK = torch.empty_like(rows_RC), torch.empty_like(weight_TK)
    if num_tokens:
        unpermute_backward_kernel[(num_tokens,)](
            rows_RC,
            weight_TK,
            place_TK,
            d_out_TC,
            d_rows_RC,
            d_weight_TK,
            C=channels,
            K=num_choices,
            BLOCK_C=tile.channels,
            num_warps=tile.num_warps,
        )
    return d_rows_RC, d_weight_TK


@on_its_gpu
def launch_swiglu(gate_up_RD: Tensor) -> Tensor:
    from mhc_kernels.device.tokens import swiglu_kernel

    rows, width = gate_up_RD.shape[0], gate_up_RD.shape[1] // 2
    out_RD = gate_up_RD.new_empty(rows, width)
    if rows:
        swiglu_kernel[(rows, -(-width // SWIGLU_TILE.channels))](
            gate_up_RD, out_RD, C=width, BLOCK_C=SWIGLU_TILE.channels, num_warps=SWIGLU_TILE.num_warps
        )
    return out_RD


@on_its_gpu
def launch_swiglu_backward(gate_up_RD: Tensor, d_out_RD: Tensor) -> Tensor:
    from mhc_kernels.device.tokens import swiglu_backward_kernel

    rows, width = d_out_RD.shape
    d_gate_up_RD = torch.empty_like(gate_up_RD)
    if rows:
        swiglu_backward_kernel[(rows, -(-width // SWIGLU_TILE.channels))](
            gate_up_RD,
            d_out_RD,
            d_gate_up_RD,
            C=width,
            BLOCK_C=SWIGLU_TILE.channels,
            num_warps=SWIGLU_TILE.num_warps,
        )
    return d_gate_up_RD
