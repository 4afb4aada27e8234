"""A chunk of layers' ends: K3 adds the last sublayer's update, K4 collapses the streams for the head."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.device.streams import post_kernel, pre_backward_kernel, pre_kernel
from mhc_kernels.launch import memory
from mhc_kernels.launch.architecture import tiles_of
from mhc_kernels.launch.backward_apply import backward_apply, new_token_gradients
from mhc_kernels.launch.memory import contiguous
from mhc_kernels.launch.sizes import token_splits
from mhc_kernels.seam_function import Update
from mhc_kernels.tiles import power_of_two_at_least


@on_its_gpu
def update_forward(streams_TNC: Tensor, update: Update) -> Tensor:
    """K3."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_of(streams_TNC).streams
    out_TNC = memory.new_result(streams_TNC.shape, streams_TNC.dtype, streams_TNC.device)
    if num_tokens:
        post_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            update.y_TC.contiguous(),
            update.post_TN.contiguous(),
            None if update.res_TNN is None else update.res_TNN.contiguous(),
            out_TNC,
            num_tokens,
            C=channels,
            N=n,
            MIXED=update.res_TNN is not None,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return out_TNC


@on_its_gpu
def update_backward(
    streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """B2 without a next sublayer."""
    num_tokens, _, channels = streams_TNC.shape
    tiles = tiles_of(streams_TNC)
    splits = token_splits(num_tokens, channels, tiles.post_backward)
    out = new_token_gradients(streams_TNC, update)
    update = Update(*(contiguous(tensor) for tensor in update))
    if num_tokens:
        backward_apply(streams_TNC, update, gradient_TNC, None, splits, out)
    assert out.y_TC is not None
    assert out.post_TN is not None
    return out.streams_TNC, out.y_TC, out.post_TN, out.res_TNN


@on_its_gpu
def collapse_forward(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    """K4."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_of(streams_TNC).streams
    out_TC = memory.new_result((num_tokens, channels), streams_TNC.dtype, streams_TNC.device)
    if num_tokens:
        pre_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            pre_TN.contiguous(),
            out_TC,
            num_tokens,
            C=channels,
            N=n,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return out_TC


@on_its_gpu
def collapse_backward(streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_of(streams_TNC).mix_pre
    d_streams_TNC = memory.new_result(streams_TNC.shape, streams_TNC.dtype, streams_TNC.device)
    d_pre_TN = memory.new_result((num_tokens, n), torch.float32, streams_TNC.device)
    if num_tokens:
        pre_backward_kernel[(triton.cdiv(num_tokens, tile.tokens),)](
            streams_TNC,
            pre_TN.contiguous(),
            gradient_TC,
            d_streams_TNC,
            d_pre_TN,
            num_tokens,
            C=channels,
            N=n,
            BT=tile.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tile.num_warps,
        )
    return d_streams_TNC, d_pre_TN
