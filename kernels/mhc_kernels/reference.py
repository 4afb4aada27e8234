"""The seam in plain torch, equation by equation: slow, obvious, and the oracle of every other backend.

Shapes: T tokens, N streams (n), C channels, M coefficients per token. Coefficients are fp32 (fp64 for fp64
streams); equation numbers are the mHC paper's (arXiv:2512.24880).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhc_kernels.dtypes import coefficient_dtype
from mhc_kernels.spec import Connection, ConnectionSpec, Mixing

SMALLEST_LOG_RATIO = -80.0
"""exp(-80) is the smallest entry Sinkhorn starts from. Below it fp32 underflows and an all-zero row would be
0/0; logits that differ by less than 80 are not touched."""


class Coefficients(NamedTuple):
    pre_TN: Tensor
    post_TN: Tensor
    res_TNN: Tensor | None


def normalised_projection(streams_TNC: Tensor, phi_MD: Tensor, norm_eps: float) -> Tensor:
    """phi vec(x) / rms(vec(x)), (T, M): Eq. 10-12. One statistic over all n*C elements, divided last."""
    x_TD = streams_TNC.flatten(1).to(phi_MD.dtype)
    rstd_T1 = (x_TD.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    return (x_TD @ phi_MD.T) * rstd_T1


def logits(mix_TM: Tensor, alpha_3: Tensor, bias_M: Tensor, num_streams: int) -> Tensor:
    """alpha * mix + bias with one alpha each for pre, post and res: Eq. 13."""
    lengths = (num_streams, num_streams, mix_TM.shape[-1] - 2 * num_streams)
    alpha_M = torch.cat([alpha.expand(length) for alpha, length in zip(alpha_3, lengths, strict=True)])
    return alpha_M * mix_TM + bias_M


def sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Eq. 9, [out, in]: columns first, rows last. The softmax over `out` is exp and the first column step."""
    shifted_TNN = logits_TNN - logits_TNN.amax(-2, keepdim=True).detach()
    res_TNN = shifted_TNN.clamp(min=SMALLEST_LOG_RATIO).softmax(-2) + eps
    res_TNN = res_TNN / (res_TNN.sum(-1, keepdim=True) + eps)
    for _ in range(iterations - 1):
        res_TNN = res_TNN / (res_TNN.sum(-2, keepdim=True) + eps)
        res_TNN = res_TNN / (res_TNN.sum(-1, keepdim=True) + eps)
    return res_TNN


def permutation_matrices(num_streams: int) -> Tensor:
    """All n! permutation matrices in lexicographic order, (n!, n, n) fp64; the first is the identity."""
    return torch.stack(
        [
            torch.eye(num_streams, dtype=torch.float64)[list(p)]
            for p in itertools.permutations(range(num_streams))
        ]
    )


@functools.cache
def permutation_table(
    num_streams: int, padded_count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The permutation matrices as rows, (padded_count, n*n), zeros after the n!-th.

    Made once per device, because the host waits for the copy to a GPU; and as an ordinary tensor even when an
    evaluation in inference mode asks first: autograd saves it.
    """
    with torch.inference_mode(False):
        table_PD = torch.zeros(padded_count, num_streams**2, dtype=dtype)
        matrices_PNN = permutation_matrices(num_streams)
        table_PD[: len(matrices_PNN)] = matrices_PNN.flatten(1)
        return table_PD.to(device)


def permutation_rows(num_streams: int, like: Tensor) -> Tensor:
    """All n! permutation matrices as rows (n!, n*n), of the dtype and on the device of `like`."""
    return permutation_table(num_streams, math.factorial(num_streams), like.dtype, like.device)


def permutation_mixture(logits_TP: Tensor, num_streams: int) -> Tensor:
    """mHC-lite: sum_p softmax(logits)_p * P_p, exactly doubly stochastic (Birkhoff)."""
    rows_PD = permutation_rows(num_streams, logits_TP)
    return (logits_TP.softmax(-1) @ rows_PD).reshape(-1, num_streams, num_streams)


def kronecker_product(logits_TK: Tensor) -> Tensor:
    """krom: D_1 x ... x D_K with D = [[s, 1 - s], [1 - s, s]], s = sigmoid(logit); (T, 2^K, 2^K)."""
    res_TNN = logits_TK.new_ones(logits_TK.shape[0], 1, 1)
    for logit_T in logits_TK.unbind(-1):
        stay_T, swap_T = logit_T.sigmoid(), (-logit_T).sigmoid()
        factor_T22 = torch.stack([stay_T, swap_T, swap_T, stay_T], dim=-1).unflatten(-1, (2, 2))
        res_TNN = torch.einsum("tab,tcd->tacbd", res_TNN, factor_T22).flatten(3).flatten(1, 2)
    return res_TNN


def gate(logits: Tensor) -> Tensor:
    """Sigmoid. Autograd multiplies by 1 - sigmoid, which at logits of 30 is rounding noise even in fp64; the
    gradient of its logarithm is accurate everywhere."""
    return functional.logsigmoid(logits).exp()


def coefficients(mix_TM: Tensor, alpha_3: Tensor, bias_M: Tensor, spec: ConnectionSpec) -> Coefficients:
    """H_pre = sigmoid, H_post = 2 sigmoid, H_res = doubly stochastic: Eq. 14-19."""
    n = spec.num_streams
    logits_TM = logits(mix_TM, alpha_3, bias_M, n)
    pre_TN = gate(logits_TM[:, :n]) + spec.pre_eps
    post_TN = 2.0 * gate(logits_TM[:, n : 2 * n])
    res_TNN: Tensor | None = None
    match spec.mixing:
        case Mixing.SINKHORN:
            res_TNN = sinkhorn(
                logits_TM[:, 2 * n :].reshape(-1, n, n), spec.sinkhorn_iterations, spec.sinkhorn_eps
            )
        case Mixing.PERMUTATIONS:
            res_TNN = permutation_mixture(logits_TM[:, 2 * n :], n)
        case Mixing.KRONECKER:
            res_TNN = kronecker_product(logits_TM[:, 2 * n :])
        case Mixing.IDENTITY:
            pass
    return Coefficients(pre_TN, post_TN, res_TNN)


def connection_coefficients(streams_TNC: Tensor, connection: Connection) -> Coefficients:
    mix_TM = normalised_projection(streams_TNC, connection.phi_MD, connection.spec.projection_norm_eps)
    return coefficients(mix_TM, connection.alpha_3, connection.bias_M, connection.spec)


def update(streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
    """x'[o] = sum_i res[o, i] x[i] + post[o] y: Eq. 3, rounded to the streams' dtype."""
    exact = post_TN.dtype
    x_TNC = streams_TNC.to(exact)
    mixed_TNC = x_TNC if res_TNN is None else torch.einsum("toi,tic->toc", res_TNN, x_TNC)
    return (mixed_TNC + post_TN.unsqueeze(-1) * y_TC.to(exact).unsqueeze(1)).to(streams_TNC.dtype)


def collapse(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    """sum_i pre[i] x[i], (T, C), in the coefficients' dtype."""
    return (pre_TN.unsqueeze(-1) * streams_TNC.to(pre_TN.dtype)).sum(1)


def reciprocal_rms(u_TC: Tensor, eps: float) -> Tensor:
    return (u_TC.square().mean(-1) + eps).rsqrt()


def sublayer_input(u_TC: Tensor, rstd_T: Tensor, gain_C: Tensor, stream_dtype: torch.dtype) -> Tensor:
    """RMSNorm of the collapsed streams, rounded once at the end."""
    return (u_TC * rstd_T.unsqueeze(-1) * gain_C.to(coefficient_dtype(stream_dtype))).to(stream_dtype)
