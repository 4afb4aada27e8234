"""K1 and K2: finish a sublayer, project, and form the input of the next one."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.device.mix_pre import mix_pre_kernel
from mhc_kernels.device.post_project import post_project_kernel
from mhc_kernels.launch import memory
from mhc_kernels.launch.architecture import product_precision, tiles_of
from mhc_kernels.launch.memory import contiguous, rows_of
from mhc_kernels.launch.mixings import mixing_code, padded_permutations, permutations
from mhc_kernels.launch.sizes import padded_coefficients, split_channels, token_chunks
from mhc_kernels.seam_function import SeamForward, Update
from mhc_kernels.spec import Connection, Mixing
from mhc_kernels.tiles import power_of_two_at_least


@on_its_gpu
def seam_forward(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    chunk_tokens: int = 0,
) -> SeamForward:
    """K1 and K2; with `chunk_tokens` in turn on chunks so short that K2 finds x' in the second-level cache.

    A chunk holds whole tiles, so chunking changes no bit.
    """
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return memory.new_result((num_tokens, *shape), dtype, device)

    result = SeamForward(
        streams_TNC if update is None else new(n, channels, dtype=streams_TNC.dtype),
        new(channels, dtype=streams_TNC.dtype),
        new(n),
        new(n),
        None if spec.mixing is Mixing.IDENTITY else new(n, n),
        new(spec.num_coefficients),
        new(),
        new(),
    )
    update = None if update is None else Update(*(contiguous(tensor) for tensor in update))
    carried_pre_TN = contiguous(carried_pre_TN)
    for rows in token_chunks(num_tokens, chunk_tokens):
        _forward_rows(
            streams_TNC[rows],
            None if update is None else Update(*rows_of(update, rows)),
            connection,
            rows_of([carried_pre_TN], rows)[0],
            SeamForward(*rows_of(result, rows)),
        )
    return result


def _forward_rows(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    out: SeamForward,
) -> None:
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_of(streams_TNC)
    m = spec.num_coefficients
    width = split_channels(channels, tiles)
    splits = triton.cdiv(channels, width)
    partial_STM = memory.new_result((splits, num_tokens, m), torch.float32, device)
    square_ST = memory.new_result((splits, num_tokens), torch.float32, device)
    y_TC, post_TN, res_TNN = update or (None, None, None)
    post_project_kernel[(triton.cdiv(num_tokens, tiles.post_project.tokens), splits)](
        streams_TNC,
        y_TC,
        post_TN,
        res_TNN,
        connection.phi_MD,
        out.streams_TNC,
        partial_STM,
        square_ST,
        num_tokens,
        C=channels,
        N=n,
        M=m,
        M_PAD=padded_coefficients(spec),
        SPLIT_CHANNELS=width,
        HAS_UPDATE=update is not None,
        MIXED=res_TNN is not None,
        PRECISION=product_precision(streams_TNC, tiles),
        BT=tiles.post_project.tokens,
        BC=tiles.post_project.channels,
        num_warps=tiles.post_project.num_warps,
        num_stages=tiles.post_project.num_stages,
    )
    mix_pre_kernel[(triton.cdiv(num_tokens, tiles.mix_pre.tokens),)](
        partial_STM,
        square_ST,
        connection.alpha_3,
        connection.bias_M,
        out.streams_TNC,
        connection.gain_C,
        carried_pre_TN,
        permutations(spec, streams_TNC),
        out.pre_TN,
        out.post_TN,
        out.res_TNN,
        out.mix_TM,
        out.projection_rstd_T,
        out.rstd_T,
        out.h_TC,
        num_tokens,
        spec.pre_eps,
        spec.sinkhorn_eps,
        spec.projection_norm_eps,
        spec.sublayer_norm_eps,
        C=channels,
        N=n,
        M=m,
        SPLITS=splits,
        MIXING=mixing_code(spec),
        ITERATIONS=spec.sinkhorn_iterations,
        P_PAD=padded_permutations(spec),
        CARRIED=carried_pre_TN is not None,
        BT=tiles.mix_pre.tokens,
        BLOCK_C=power_of_two_at_least(channels),
        num_warps=tiles.mix_pre.num_warps,
    )
