"""Seam arithmetic for CPUs: blocks of tokens that stay in the cache, and no large temporaries.

Two things cost time on a CPU: passes over (T, n, C) tensors that leave the cache, and fresh allocations of
that size, whose page faults take several times longer than the copy they serve. So the tokens are walked in
blocks, temporaries have block size, and only results are allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mhc_kernels import token_last
from mhc_kernels.dtypes import coefficient_dtype
from mhc_kernels.seam_function import InputGradients, SeamForward, SeamGradients, SeamSaved, Update
from mhc_kernels.spec import Connection, Kept, Regenerated

BLOCK_BYTES = 2 << 20
"""Bytes of one block of streams in fp32: about what a second-level cache holds of it and its neighbours."""


class CpuOperations:
    def seam_forward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
    ) -> SeamForward:
        spec = connection.spec
        num_tokens, num_streams, channels = streams_TNC.shape
        exact = coefficient_dtype(streams_TNC.dtype)
        out_TNC = streams_TNC if update is None else torch.empty_like(streams_TNC)
        mix_TM = streams_TNC.new_empty(num_tokens, spec.num_coefficients, dtype=exact)
        norm_T = streams_TNC.new_empty(num_tokens, dtype=exact)
        for block in _blocks(streams_TNC):
            if update is not None:
                _update_block(streams_TNC, update, block, out_TNC)
            x_BD = out_TNC[block].flatten(1).to(exact)
            torch.mm(x_BD, connection.phi_MD.T, out=mix_TM[block])
            torch.linalg.vector_norm(x_BD, dim=1, out=norm_T[block])
        rstd_x_T = (norm_T.square_().div_(num_streams * channels).add_(spec.projection_norm_eps)).rsqrt_()
        mix_TM.mul_(rstd_x_T.unsqueeze(1))
        own = token_last.coefficients(mix_TM, connection.alpha_3, connection.bias_M, spec)
        used_pre_TN = own.pre_TN if carried_pre_TN is None else carried_pre_TN
        h_TC = streams_TNC.new_empty(num_tokens, channels)
        rstd_T = streams_TNC.new_empty(num_tokens, dtype=exact)
        gain_C = connection.gain_C.to(exact)
        for block in _blocks(streams_TNC):
            u_BC = _collapse_block(out_TNC, used_pre_TN, block)
            norm_B = torch.linalg.vector_norm(u_BC, dim=1)
            rstd_T[block] = norm_B.square_().div_(channels).add_(spec.sublayer_norm_eps).rsqrt_()
            h_TC[block] = _scale_block(u_BC, rstd_T, gain_C, block)
        return SeamForward(out_TNC, h_TC, own.pre_TN, own.post_TN, own.res_TNN, mix_TM, rstd_x_T, rstd_T)

    def seam_backward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
        saved: SeamSaved,
        gradients: SeamGradients,
    ) -> InputGradients:
        spec = connection.spec
        exact = coefficient_dtype(streams_TNC.dtype)
        num_tokens, num_streams, channels = streams_TNC.shape
        pre_TN = saved.pre_TN if carried_pre_TN is None else carried_pre_TN
        gain_C = connection.gain_C.to(exact)

        # RMSNorm and collapse: the gradient of u, and from it the gradient of the H_pre that was used.
        d_u_TC = torch.empty(num_tokens, channels, dtype=exact)
        d_used_pre_TN = torch.empty_like(pre_TN)
        d_gain_C = torch.zeros(channels, dtype=exact)
        for block in _blocks(streams_TNC):
            x_BNC = saved.streams_TNC[block].to(exact)
            rstd_B1 = saved.rstd_T[block].unsqueeze(1)
            unit_BC = _collapse_block(saved.streams_TNC, pre_TN, block).mul_(rstd_B1)
            d_h_BC = gradients.h_TC[block].to(exact)
            d_u_BC = torch.mul(d_h_BC, gain_C, out=d_u_TC[block])
            d_gain_C += torch.mul(d_h_BC, unit_BC).sum(0)
            projection_B1 = torch.linalg.vecdot(d_u_BC, unit_BC).div_(-channels).unsqueeze(1)
            d_u_BC.addcmul_(unit_BC, projection_B1).mul_(rstd_B1)
            _dot_streams(x_BNC, d_u_BC, d_used_pre_TN[block])

        # Coefficients: from the gradients of H_pre, H_post, H_res back to the projection.
        routed = token_last.route_pre_gradient(d_used_pre_TN, gradients.pre_TN, carried_pre_TN is not None)
        coefficients = token_last.coefficients_backward(
            saved.mix_TM,
            connection.alpha_3,
            connection.bias_M,
            spec,
            routed.own_TN,
            gradients.post_TN,
            gradients.res_TNN,
        )
        d_projection_TM, shrink_T = token_last.projection_gradient(
            coefficients.mix_TM, saved.mix_TM, saved.projection_rstd_T, num_streams * channels
        )

        # Streams: total gradient of x', then through the update to x, y and sublayer l's coefficients.
        d_phi_MD = torch.zeros_like(connection.phi_MD)
        d_streams_TNC = torch.empty_like(streams_TNC)
        d_update = None if update is None else _EmptyUpdateGradients(update)
        for block in _blocks(streams_TNC):
            x_BNC = saved.streams_TNC[block].to(exact)
            total_BNC = torch.addmm(
                gradients.streams_TNC[block].flatten(1).to(exact), d_projection_TM[block], connection.phi_MD
            ).view_as(x_BNC)
            total_BNC.baddbmm_(pre_TN[block].unsqueeze(2), d_u_TC[block].unsqueeze(1))
            total_BNC.addcmul_(x_BNC, shrink_T[block, None, None], value=-1.0)
            d_phi_MD.addmm_(d_projection_TM[block].T, x_BNC.flatten(1))
            if update is None or d_update is None:
                d_streams_TNC[block] = total_BNC
            else:
                _update_backward_block(streams_TNC, update, block, total_BNC, d_streams_TNC, d_update)
        return InputGradients(
            d_streams_TNC,
            None if d_update is None else d_update.y_TC,
            None if d_update is None else d_update.post_TN,
            None if d_update is None else d_update.res_TNN,
            routed.carried_TN,
            d_phi_MD,
            coefficients.alpha_3,
            coefficients.bias_M,
            d_gain_C.to(connection.gain_C.dtype),
        )

    def update_forward(self, streams_TNC: Tensor, update: Update) -> Tensor:
        out_TNC = torch.empty_like(streams_TNC)
        for block in _blocks(streams_TNC):
            _update_block(streams_TNC, update, block, out_TNC)
        return out_TNC

    def update_backward(
        self, streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        d_streams_TNC = torch.empty_like(streams_TNC)
        d_update = _EmptyUpdateGradients(update)
        for block in _blocks(streams_TNC):
            total_BNC = gradient_TNC[block].to(update.post_TN.dtype)
            _update_backward_block(streams_TNC, update, block, total_BNC, d_streams_TNC, d_update)
        return d_streams_TNC, d_update.y_TC, d_update.post_TN, d_update.res_TNN

    def collapse_forward(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        out_TC = torch.empty_like(streams_TNC[:, 0], memory_format=torch.contiguous_format)
        for block in _blocks(streams_TNC):
            out_TC[block] = _collapse_block(streams_TNC, pre_TN, block)
        return out_TC

    def collapse_backward(
        self, streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_streams_TNC, d_pre_TN = torch.empty_like(streams_TNC), torch.empty_like(pre_TN)
        for block in _blocks(streams_TNC):
            d_u_BC = gradient_TC[block].to(pre_TN.dtype)
            d_streams_TNC[block] = pre_TN[block].unsqueeze(2) * d_u_BC.unsqueeze(1)
            _dot_streams(streams_TNC[block].to(pre_TN.dtype), d_u_BC, d_pre_TN[block])
        return d_streams_TNC, d_pre_TN

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        """Walks the tokens once per sublayer with the forward's own block functions, hence bit-equal."""
        regenerated: list[Regenerated] = []
        for index, sublayer in enumerate(kept):
            h_TC = torch.empty_like(streams_TNC[:, 0], memory_format=torch.contiguous_format)
            gain_C = sublayer.gain_C.to(coefficient_dtype(streams_TNC.dtype))
            last = index + 1 == len(kept)
            next_TNC = streams_TNC if last else torch.empty_like(streams_TNC)
            for block in _blocks(streams_TNC):
                u_BC = _collapse_block(streams_TNC, sublayer.pre_TN, block)
                h_TC[block] = _scale_block(u_BC, sublayer.rstd_T, gain_C, block)
                if not last:
                    assert sublayer.y_TC is not None
                    update = Update(sublayer.y_TC, sublayer.post_TN, sublayer.res_TNN)
                    _update_block(streams_TNC, update, block, next_TNC)
            regenerated.append(Regenerated(streams_TNC, h_TC))
            streams_TNC = next_TNC
        return regenerated


class _EmptyUpdateGradients:
    """Uninitialised gradients of an Update; every block writes its rows."""

    def __init__(self, update: Update) -> None:
        self.y_TC = torch.empty_like(update.y_TC, memory_format=torch.contiguous_format)
        self.post_TN = torch.empty_like(update.post_TN, memory_format=torch.contiguous_format)
        self.res_TNN = (
            None
            if update.res_TNN is None
            else torch.empty_like(update.res_TNN, memory_format=torch.contiguous_format)
        )


def _blocks(streams_TNC: Tensor) -> Iterator[slice]:
    num_tokens, num_streams, channels = streams_TNC.shape
    size = max(8, BLOCK_BYTES // (4 * num_streams * channels))
    return (slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size))


def _update_block(streams_TNC: Tensor, update: Update, block: slice, out_TNC: Tensor) -> None:
    """out = res x + post y for one block of tokens."""
    exact = update.post_TN.dtype
    y_B1C, post_BN1 = update.y_TC[block].to(exact).unsqueeze(1), update.post_TN[block].unsqueeze(2)
    x_BNC = streams_TNC[block].to(exact)
    direct = out_TNC.dtype == exact
    target_BNC = out_TNC[block] if direct else torch.empty_like(x_BNC)
    if update.res_TNN is None:
        torch.addcmul(x_BNC, post_BN1, y_B1C, out=target_BNC)
    else:
        torch.mul(post_BN1, y_B1C, out=target_BNC)
        target_BNC.baddbmm_(update.res_TNN[block], x_BNC)
    if not direct:
        out_TNC[block] = target_BNC


def _update_backward_block(
    streams_TNC: Tensor,
    update: Update,
    block: slice,
    total_BNC: Tensor,
    d_streams_TNC: Tensor,
    d_update: _EmptyUpdateGradients,
) -> None:
    """dx = res^T D, dy = post . D, dpost[o] = <D[o], y>, dres[o, i] = <D[o], x[i]> of one block."""
    exact = total_BNC.dtype
    y_BC = update.y_TC[block].to(exact)
    d_update.y_TC[block] = torch.bmm(update.post_TN[block].unsqueeze(1), total_BNC).squeeze(1)
    _dot_streams(total_BNC, y_BC, d_update.post_TN[block])
    if update.res_TNN is None or d_update.res_TNN is None:
        d_streams_TNC[block] = total_BNC
        return
    torch.bmm(total_BNC, streams_TNC[block].to(exact).transpose(1, 2), out=d_update.res_TNN[block])
    transposed_BNN = update.res_TNN[block].transpose(1, 2)
    if d_streams_TNC.dtype == exact:
        torch.bmm(transposed_BNN, total_BNC, out=d_streams_TNC[block])
    else:
        d_streams_TNC[block] = torch.bmm(transposed_BNN, total_BNC)


def _dot_streams(x_BNC: Tensor, row_BC: Tensor, out_BN: Tensor) -> None:
    """out[n] = <x[n], row>. The row stands first: a batch of matrices times columns takes torch's processor
    path an order of magnitude longer than the same dots as a batch of rows times transposed matrices.
    """
    torch.bmm(row_BC.unsqueeze(1), x_BNC.transpose(1, 2), out=out_BN.unsqueeze(1))


def _collapse_block(streams_TNC: Tensor, pre_TN: Tensor, block: slice) -> Tensor:
    return torch.bmm(pre_TN[block].unsqueeze(1), streams_TNC[block].to(pre_TN.dtype)).squeeze(1)


def _scale_block(u_BC: Tensor, rstd_T: Tensor, gain_C: Tensor, block: slice) -> Tensor:
    return u_BC.mul_(rstd_T[block].unsqueeze(1)).mul_(gain_C)
