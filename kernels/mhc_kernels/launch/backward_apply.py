"""B2: the gradients of streams, y, post and res, and partial ones of phi and gain."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.device.backward_apply import backward_apply_kernel
from mhc_kernels.device.backward_phi import backward_phi_kernel
from mhc_kernels.device.backward_streams import backward_streams_kernel
from mhc_kernels.launch import memory
from mhc_kernels.launch.architecture import product_precision, tiles_of
from mhc_kernels.launch.reduce_partials import reduce_partials
from mhc_kernels.launch.sizes import tokens_per_split
from mhc_kernels.seam_function import Update
from mhc_kernels.tiles import Tile, power_of_two_at_least


class TokenGradients(NamedTuple):
    """Results of B2 that belong to tokens."""

    streams_TNC: Tensor
    y_TC: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None


class Behind(NamedTuple):
    """What B2 takes from the sublayer that the seam prepared, and its partial parameter gradients."""

    d_h_TC: Tensor
    gain_C: Tensor
    used_pre_TN: Tensor
    rstd_T: Tensor
    h_dot_T: Tensor
    shrink_T: Tensor
    d_projection_TM: Tensor
    phi_MD: Tensor
    d_phi_SMD: Tensor | None
    d_gain_SC: Tensor


def new_token_gradients(streams_TNC: Tensor, update: Update | None) -> TokenGradients:
    num_tokens, n, channels = streams_TNC.shape
    device, dtype = streams_TNC.device, streams_TNC.dtype
    mixed = update is not None and update.res_TNN is not None
    return TokenGradients(
        memory.new_result(streams_TNC.shape, dtype, device),
        None if update is None else memory.new_result((num_tokens, channels), dtype, device),
        None if update is None else memory.new_result((num_tokens, n), torch.float32, device),
        memory.new_result((num_tokens, n, n), torch.float32, device) if mixed else None,
    )


def backward_apply(
    streams_TNC: Tensor,
    update: Update | None,
    gradient_TNC: Tensor,
    behind: Behind | None,
    splits: int,
    out: TokenGradients,
    *,
    accumulate: bool = False,
) -> None:
    """B2 with its token-wise reductions, without dphi where `backward_phi` sums that. `behind` is None at a
    chunk of layers' end."""
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_of(streams_TNC)
    tile = tiles.post_backward if behind is None else tiles.backward_apply
    blocks = triton.cdiv(channels, tile.channels)
    y_TC, post_TN, res_TNN = update or (None, None, None)
    d_post_BTN, d_res_BTNN = (
        None if whole is None else memory.new_result((blocks, *whole.shape), torch.float32, whole.device)
        for whole in (out.post_TN, out.res_TNN)
    )
    *through, phi, d_phi, d_gain = behind or (None,) * len(Behind._fields)
    m = 1 if phi is None else phi.shape[0]
    inputs = (streams_TNC, y_TC, post_TN, res_TNN, gradient_TNC, *through, phi)
    results = (out.streams_TNC, out.y_TC, d_post_BTN, d_res_BTNN)
    sizes = (num_tokens, tokens_per_split(num_tokens, splits, tile))
    constants = {
        "C": channels,
        "N": n,
        "M": m,
        "M_PAD": max(16, power_of_two_at_least(m)),
        "HAS_UPDATE": update is not None,
        "MIXED": res_TNN is not None,
        "ACCUMULATE": accumulate,
        "PRECISION": product_precision(streams_TNC, tiles),
        "BT": tile.tokens,
        "BC": tile.channels,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if behind is not None and tiles.backward_phi is not None:
        backward_streams_kernel[(blocks, splits)](*inputs, *results, d_gain, *sizes, **constants)
    else:
        backward_apply_kernel[(blocks, splits)](
            *inputs, *results, d_phi, d_gain, *sizes, HAS_NEXT=behind is not None, **constants
        )
    for partial, whole in ((d_post_BTN, out.post_TN), (d_res_BTNN, out.res_TNN)):
        if partial is not None:
            reduce_partials(partial, whole)


def backward_phi(
    streams_TNC: Tensor,
    d_projection_TM: Tensor,
    d_phi_SMD: Tensor,
    tile: Tile,
    *,
    precision: str,
    accumulate: bool,
) -> None:
    """B2b: partial dphi from x' and the gradient of phi x'."""
    num_tokens, n, channels = streams_TNC.shape
    splits, m, width = d_phi_SMD.shape
    backward_phi_kernel[(triton.cdiv(width, tile.channels), splits)](
        streams_TNC,
        d_projection_TM,
        d_phi_SMD,
        num_tokens,
        tokens_per_split(num_tokens, splits, tile),
        D=n * channels,
        M=m,
        M_PAD=max(16, power_of_two_at_least(m)),
        ACCUMULATE=accumulate,
        PRECISION=precision,
        BT=tile.tokens,
        BC=tile.channels,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
