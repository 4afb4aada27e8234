"""The gradients of a whole seam: B1, then B2, in turn on chunks of tokens, then B3."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.ambient import on_its_gpu
from mhc_kernels.device.backward_dots import backward_dots_kernel
from mhc_kernels.launch import memory
from mhc_kernels.launch.architecture import product_precision, tiles_of
from mhc_kernels.launch.backward_apply import (
    Behind,
    TokenGradients,
    backward_apply,
    backward_phi,
    new_token_gradients,
)
from mhc_kernels.launch.memory import contiguous, inner_contiguous, rows_of
from mhc_kernels.launch.mixings import mixing_code, padded_permutations, permutations
from mhc_kernels.launch.reduce_partials import reduce_partials
from mhc_kernels.launch.sizes import parameter_splits, token_chunks
from mhc_kernels.seam_function import InputGradients, SeamGradients, SeamSaved, Update
from mhc_kernels.spec import Connection
from mhc_kernels.tiles import power_of_two_at_least


@on_its_gpu
def seam_backward(
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
    saved: SeamSaved,
    gradients: SeamGradients,
    chunk_tokens: int = 0,
) -> InputGradients:
    """B1, B2, B3; with `chunk_tokens` in turn on chunks so short that B2 finds what B1 read in the cache.

    dphi and dgain grow from chunk to chunk in a fixed order, which is another one than without chunks; every
    other gradient is the same, bit for bit.
    """
    spec, device = connection.spec, streams_TNC.device
    num_tokens, n, channels = streams_TNC.shape
    tiles = tiles_of(streams_TNC)
    m = spec.num_coefficients
    fp32 = torch.float32
    update = None if update is None else Update(*(contiguous(tensor) for tensor in update))
    used_pre_TN = saved.pre_TN if carried_pre_TN is None else carried_pre_TN.contiguous()
    d_handed_TN = None if gradients.pre_TN is None else inner_contiguous(gradients.pre_TN)
    d_post_TN = inner_contiguous(gradients.post_TN)
    d_res_TK = None if gradients.res_TNN is None else inner_contiguous(gradients.res_TNN.flatten(1))
    d_used_pre_TN = None if carried_pre_TN is None else memory.new_result((num_tokens, n), fp32, device)
    d_logit_P2M = memory.new_result((triton.cdiv(num_tokens, tiles.backward_dots.tokens), 2, m), fp32, device)
    chunks = token_chunks(num_tokens, chunk_tokens)
    remix = len(chunks) > 1 and update is not None
    splits = parameter_splits(chunk_tokens or num_tokens, n, channels, tiles)
    d_phi_SMD = memory.new_result((splits.phi, m, n * channels), fp32, device)
    d_gain_SC = memory.new_result((splits.gain, channels), fp32, device)
    if not chunks:
        d_phi_SMD.zero_()
        d_gain_SC.zero_()
    out = new_token_gradients(streams_TNC, update)
    for rows in chunks:
        rows_update = None if update is None else Update(*rows_of(update, rows))
        size = rows.stop - rows.start
        d_projection_TM = memory.new_result((size, m), fp32, device)
        shrink_T, h_dot_T = (memory.new_result((size,), fp32, device) for _ in range(2))
        rows_pre, rows_rstd, rows_d_h = used_pre_TN[rows], saved.rstd_T[rows], gradients.h_TC[rows]
        program_rows = slice(rows.start // tiles.backward_dots.tokens, None)
        backward_dots_kernel[(triton.cdiv(size, tiles.backward_dots.tokens),)](
            (streams_TNC if remix else saved.streams_TNC)[rows],
            *((rows_update if remix else None) or (None, None, None)),
            rows_d_h,
            connection.gain_C,
            rows_pre,
            rows_rstd,
            saved.projection_rstd_T[rows],
            saved.mix_TM[rows],
            connection.alpha_3,
            connection.bias_M,
            *rows_of([d_handed_TN, d_post_TN, d_res_TK], rows),
            permutations(spec, streams_TNC),
            *rows_of([d_used_pre_TN], rows),
            d_projection_TM,
            shrink_T,
            h_dot_T,
            d_logit_P2M[program_rows],
            size,
            0 if d_handed_TN is None else d_handed_TN.stride(0),
            d_post_TN.stride(0),
            0 if d_res_TK is None else d_res_TK.stride(0),
            spec.sinkhorn_eps,
            C=channels,
            N=n,
            M=m,
            MIXING=mixing_code(spec),
            ITERATIONS=spec.sinkhorn_iterations,
            P_PAD=padded_permutations(spec),
            CARRIED=carried_pre_TN is not None,
            HANDED=d_handed_TN is not None,
            REMIX=remix,
            MIXED=remix and update is not None and update.res_TNN is not None,
            BT=tiles.backward_dots.tokens,
            BLOCK_C=power_of_two_at_least(channels),
            num_warps=tiles.backward_dots.num_warps,
        )
        backward_apply(
            streams_TNC[rows],
            rows_update,
            gradients.streams_TNC[rows],
            Behind(
                *(rows_d_h, connection.gain_C, rows_pre, rows_rstd, h_dot_T, shrink_T, d_projection_TM),
                *(connection.phi_MD, None if tiles.backward_phi else d_phi_SMD, d_gain_SC),
            ),
            splits.gain,
            TokenGradients(*rows_of(out, rows)),
            accumulate=rows.start > 0,
        )
        if tiles.backward_phi is not None:
            backward_phi(
                *(saved.streams_TNC[rows], d_projection_TM, d_phi_SMD, tiles.backward_phi),
                precision=product_precision(streams_TNC, tiles),
                accumulate=rows.start > 0,
            )
    d_logit_2M = reduce_partials(d_logit_P2M)
    return InputGradients(
        *out,
        d_used_pre_TN,
        reduce_partials(d_phi_SMD),
        torch.stack([part.sum() for part in d_logit_2M[1].tensor_split([n, 2 * n])]),
        d_logit_2M[0],
        reduce_partials(d_gain_SC).to(connection.gain_C.dtype),
    )
