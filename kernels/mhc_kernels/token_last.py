"""Coefficients with tokens in the last dimension, and their backward by hand.

(n, n, T) keeps every step of Sinkhorn a contiguous, vectorised operation; (T, n, n) reduces over 4
neighbours at a time and is several times slower. The backward works on gradients with respect to the
*logarithm* of the matrix: for N = M / (sum(M) + eps), d log M = G - N * sum(G) with G = d log N. No division
occurs, so entries of 1e-30 are as safe as entries of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_kernels.reference import SMALLEST_LOG_RATIO, Coefficients, permutation_rows
from mhc_kernels.spec import ConnectionSpec, Mixing


class CoefficientGradients(NamedTuple):
    mix_TM: Tensor
    alpha_3: Tensor
    bias_M: Tensor


def coefficients(mix_TM: Tensor, alpha_3: Tensor, bias_M: Tensor, spec: ConnectionSpec) -> Coefficients:
    """H_pre (T, n), H_post (T, n), H_res (T, n, n) from `mix`; see reference.coefficients."""
    n = spec.num_streams
    logits_MT = _logits(mix_TM, alpha_3, bias_M, n)
    pre_TN = (logits_MT[:n].sigmoid() + spec.pre_eps).T.contiguous()
    post_TN = (2.0 * logits_MT[n : 2 * n].sigmoid()).T.contiguous()
    res_TNN: Tensor | None = None
    match spec.mixing:
        case Mixing.SINKHORN:
            res_NNT = _sinkhorn_start(logits_MT[2 * n :].reshape(n, n, -1)).add_(spec.sinkhorn_eps)
            eps = spec.sinkhorn_eps
            res_NNT.div_(res_NNT.sum(1, keepdim=True).add_(eps))
            for _ in range(spec.sinkhorn_iterations - 1):
                res_NNT.div_(res_NNT.sum(0, keepdim=True).add_(eps))
                res_NNT.div_(res_NNT.sum(1, keepdim=True).add_(eps))
            res_TNN = res_NNT.permute(2, 0, 1).contiguous()
        case Mixing.PERMUTATIONS | Mixing.KRONECKER:
            mixture = _mixture(spec, mix_TM)
            weights_PT = mixture.weights(logits_MT[2 * n :])
            res_TNN = (weights_PT.T @ mixture.matrices_PD).reshape(-1, n, n)
        case Mixing.IDENTITY:
            pass
    return Coefficients(pre_TN, post_TN, res_TNN)


def coefficients_backward(
    mix_TM: Tensor,
    alpha_3: Tensor,
    bias_M: Tensor,
    spec: ConnectionSpec,
    d_pre_TN: Tensor,
    d_post_TN: Tensor,
    d_res_TNN: Tensor | None,
) -> CoefficientGradients:
    """Gradients of mix, alpha and bias; the coefficients are recomputed from `mix_TM`."""
    n = spec.num_streams
    logits_MT = _logits(mix_TM, alpha_3, bias_M, n)
    d_logits_MT = torch.empty_like(logits_MT)
    gates_MT = logits_MT[: 2 * n]
    slopes_MT = gates_MT.sigmoid() * (-gates_MT).sigmoid()  # 1 - sigmoid would be 0 from logits of 17 on
    d_logits_MT[:n] = d_pre_TN.T * slopes_MT[:n]
    d_logits_MT[n : 2 * n] = 2.0 * d_post_TN.T * slopes_MT[n:]
    match spec.mixing:
        case Mixing.SINKHORN:
            assert d_res_TNN is not None
            d_res_NNT = d_res_TNN.permute(1, 2, 0).contiguous()
            d_logits_MT[2 * n :] = _sinkhorn_backward(
                logits_MT[2 * n :].reshape(n, n, -1), d_res_NNT, spec
            ).flatten(0, 1)
        case Mixing.PERMUTATIONS | Mixing.KRONECKER:
            assert d_res_TNN is not None
            mixture = _mixture(spec, mix_TM)
            weights_PT = mixture.weights(logits_MT[2 * n :])
            gradient_PT = mixture.matrices_PD @ d_res_TNN.flatten(1).T
            gradient_PT *= weights_PT
            gradient_PT -= weights_PT * gradient_PT.sum(0)
            d_logits_MT[2 * n :] = (
                gradient_PT if mixture.signs_PK is None else mixture.signs_PK.T @ gradient_PT
            )
        case Mixing.IDENTITY:
            pass
    per_coefficient_M = (d_logits_MT * mix_TM.T).sum(1)
    d_alpha_3 = torch.stack([part.sum() for part in per_coefficient_M.tensor_split([n, 2 * n])])
    return CoefficientGradients(
        (d_logits_MT * _scales(alpha_3, spec.num_coefficients, n).unsqueeze(1)).T.contiguous(),
        d_alpha_3,
        d_logits_MT.sum(1),
    )


class _Mixture(NamedTuple):
    """H_res = sum_p softmax(signs logits)_p matrices_p; without signs the logits are the mixture's own."""

    matrices_PD: Tensor
    signs_PK: Tensor | None

    def weights(self, logits_KT: Tensor) -> Tensor:
        return (logits_KT if self.signs_PK is None else self.signs_PK @ logits_KT).softmax(0)


def _mixture(spec: ConnectionSpec, like: Tensor) -> _Mixture:
    """A Kronecker product of 2x2 factors is a mixture too: of the n permutations i -> i ^ p.

    Factor k stays or swaps by bit k of p, with shares sigmoid(+-logit): log weight_p is sum_k +-logit_k / 2
    up to a constant.
    """
    n = spec.num_streams
    if spec.mixing is Mixing.PERMUTATIONS:
        return _Mixture(permutation_rows(n, like), None)
    index_N = torch.arange(n, device=like.device)
    matrices_PNN = (index_N[:, None] ^ index_N == index_N[:, None, None]).to(like)
    high_to_low_K = torch.arange(spec.num_res_coefficients - 1, -1, -1, device=like.device)
    signs_PK = 0.5 - ((index_N[:, None] >> high_to_low_K) & 1).to(like)
    return _Mixture(matrices_PNN.flatten(1), signs_PK)


class RoutedPreGradient(NamedTuple):
    """Gradient of the seam's own H_pre, and of a carried one (None when the own one was used)."""

    own_TN: Tensor
    carried_TN: Tensor | None


def route_pre_gradient(d_used_TN: Tensor, d_handed_on_TN: Tensor | None, carried: bool) -> RoutedPreGradient:
    """The collapse's gradient belongs to the H_pre it used; a handed-on one's to its maker."""
    if carried:
        own_TN = torch.zeros_like(d_used_TN) if d_handed_on_TN is None else d_handed_on_TN
        return RoutedPreGradient(own_TN, d_used_TN)
    return RoutedPreGradient(d_used_TN if d_handed_on_TN is None else d_used_TN + d_handed_on_TN, None)


class ProjectionGradient(NamedTuple):
    """d(phi x) (T, M), and the factor (T,) by which x is subtracted for the division by its rms."""

    projection_TM: Tensor
    shrink_T: Tensor


def projection_gradient(
    d_mix_TM: Tensor, mix_TM: Tensor, rstd_T: Tensor, num_elements: int
) -> ProjectionGradient:
    """mix = p / rms(x): dp = d_mix / rms, and dx loses x * <d_mix, mix> / (rms^2 * num_elements)."""
    shrink_T = (d_mix_TM * mix_TM).sum(1) * rstd_T.square() / num_elements
    return ProjectionGradient(d_mix_TM * rstd_T.unsqueeze(1), shrink_T)


def _scales(alpha_3: Tensor, num_coefficients: int, n: int) -> Tensor:
    return torch.cat(
        [alpha_3[0].expand(n), alpha_3[1].expand(n), alpha_3[2].expand(num_coefficients - 2 * n)]
    )


def _logits(mix_TM: Tensor, alpha_3: Tensor, bias_M: Tensor, n: int) -> Tensor:
    alpha_M = _scales(alpha_3, mix_TM.shape[1], n)
    return torch.addcmul(bias_M.unsqueeze(1), alpha_M.unsqueeze(1), mix_TM.T.contiguous())


def _sinkhorn_start(logits_NNT: Tensor) -> Tensor:
    """Softmax over `out` (dim 0) with the floor of reference.sinkhorn."""
    return (logits_NNT - logits_NNT.amax(0, keepdim=True)).clamp_(min=SMALLEST_LOG_RATIO).softmax(0)


def _sinkhorn_backward(logits_NNT: Tensor, d_res_NNT: Tensor, spec: ConnectionSpec) -> Tensor:
    """d logits. Every intermediate matrix is kept in one buffer (2 * iterations, n, n, T) while this runs."""
    eps = spec.sinkhorn_eps
    start_NNT = _sinkhorn_start(logits_NNT)
    history = torch.empty(
        2 * spec.sinkhorn_iterations, *logits_NNT.shape, dtype=logits_NNT.dtype, device=logits_NNT.device
    )
    torch.add(start_NNT, eps, out=history[0])
    for step in range(1, len(history)):
        previous_NNT = history[step - 1]
        torch.div(previous_NNT, previous_NNT.sum(step % 2, keepdim=True).add_(eps), out=history[step])
    gradient_NNT = d_res_NNT * history[-1]
    for step in range(len(history) - 1, 0, -1):
        gradient_NNT.addcmul_(history[step], gradient_NNT.sum(step % 2, keepdim=True), value=-1.0)
    if eps:
        gradient_NNT.mul_(start_NNT).div_(history[0])
    gradient_NNT.addcmul_(start_NNT, gradient_NNT.sum(0, keepdim=True), value=-1.0)
    floor = logits_NNT.amax(0, keepdim=True) + SMALLEST_LOG_RATIO
    return gradient_NNT.masked_fill_(logits_NNT < floor, 0.0)
