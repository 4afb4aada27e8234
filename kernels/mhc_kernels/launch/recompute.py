"""R: what a block of sublayers dropped, formed again in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.device.streams import recompute_block_kernel
from mhc_kernels.launch import memory
from mhc_kernels.launch.architecture import tiles_of
from mhc_kernels.spec import Kept, Regenerated


@on_its_gpu
def recompute_block(streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
    """R: all sublayers of the block in one launch."""
    num_tokens, n, channels = streams_TNC.shape
    tile = tiles_of(streams_TNC).streams
    device, dtype = streams_TNC.device, streams_TNC.dtype
    inner = kept[:-1]
    h_LTC = [memory.new_result((num_tokens, channels), dtype, device) for _ in kept]
    out_LTNC = [memory.new_result(streams_TNC.shape, dtype, device) for _ in inner]
    mixed = bool(inner) and inner[0].res_TNN is not None
    if num_tokens:
        recompute_block_kernel[(triton.cdiv(num_tokens, tile.tokens), triton.cdiv(channels, tile.channels))](
            streams_TNC,
            tuple(_present(sublayer.y_TC).contiguous() for sublayer in inner),
            tuple(sublayer.pre_TN.contiguous() for sublayer in kept),
            tuple(sublayer.rstd_T for sublayer in kept),
            tuple(sublayer.gain_C for sublayer in kept),
            tuple(sublayer.post_TN.contiguous() for sublayer in inner),
            tuple(_present(sublayer.res_TNN).contiguous() for sublayer in inner) if mixed else (),
            tuple(h_LTC),
            tuple(out_LTNC),
            num_tokens,
            L=len(kept),
            C=channels,
            N=n,
            MIXED=mixed,
            BT=tile.tokens,
            BC=tile.channels,
            num_warps=tile.num_warps,
        )
    return [Regenerated(x_TNC, h_TC) for x_TNC, h_TC in zip([streams_TNC, *out_LTNC], h_LTC, strict=True)]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
