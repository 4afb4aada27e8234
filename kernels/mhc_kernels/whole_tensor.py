"""The stream-sized parts of a seam as whole-tensor formulas, written for a compiler to fuse.

Sums over streams are written out as n products instead of small matrix products: torch.compile turns each
group of them into one loop over the channels. The coefficients stay with token_last.py: Sinkhorn's 40
unrolled steps are 1 ms of run time, but a minute and more of compilation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels.seam_function import Update


def update(streams_TNC: Tensor, tail: Update) -> Tensor:
    """x' = res x + post y, rounded to the streams' dtype."""
    exact = tail.post_TN.dtype
    x_TNC = streams_TNC.to(exact)
    out_TNC = tail.post_TN.unsqueeze(2) * tail.y_TC.to(exact).unsqueeze(1)
    if tail.res_TNN is None:
        return (out_TNC + x_TNC).to(streams_TNC.dtype)
    for i in range(x_TNC.shape[1]):
        out_TNC = out_TNC + tail.res_TNN[:, :, i].unsqueeze(2) * x_TNC[:, i].unsqueeze(1)
    return out_TNC.to(streams_TNC.dtype)


def update_backward(
    streams_TNC: Tensor, tail: Update, total_TNC: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, y, post, res from the gradient of x'."""
    exact = tail.post_TN.dtype
    n = streams_TNC.shape[1]
    total_TNC = total_TNC.to(exact)
    y_TC, x_TNC = tail.y_TC.to(exact), streams_TNC.to(exact)
    d_y_TC = weighted_sum(tail.post_TN, total_TNC).to(tail.y_TC.dtype)
    d_post_TN = (total_TNC * y_TC.unsqueeze(1)).sum(2)
    if tail.res_TNN is None:
        return total_TNC.to(streams_TNC.dtype), d_y_TC, d_post_TN, None
    d_streams_TNC = torch.zeros_like(total_TNC)
    for o in range(n):
        d_streams_TNC = d_streams_TNC + tail.res_TNN[:, o].unsqueeze(2) * total_TNC[:, o].unsqueeze(1)
    d_res_TNN = torch.stack([(total_TNC * x_TNC[:, i].unsqueeze(1)).sum(2) for i in range(n)], dim=2)
    return d_streams_TNC.to(streams_TNC.dtype), d_y_TC, d_post_TN, d_res_TNN


def weighted_sum(weight_TN: Tensor, streams_TNC: Tensor) -> Tensor:
    """sum_i weight[i] x[i] in the weights' dtype, (T, C)."""
    x_TNC = streams_TNC.to(weight_TN.dtype)
    total_TC = weight_TN[:, 0, None] * x_TNC[:, 0]
    for i in range(1, weight_TN.shape[1]):
        total_TC = total_TC + weight_TN[:, i, None] * x_TNC[:, i]
    return total_TC


def scale(u_TC: Tensor, rstd_T: Tensor, gain_C: Tensor, dtype: torch.dtype) -> Tensor:
    return (u_TC * rstd_T.unsqueeze(1) * gain_C.to(u_TC.dtype)).to(dtype)


def project(x_TNC: Tensor, phi_MD: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Normalised projection (T, M) and 1/rms over all n*C elements (T,)."""
    x_TD = x_TNC.flatten(1).to(phi_MD.dtype)
    rstd_T = (x_TD.square().mean(1) + norm_eps).rsqrt()
    return (x_TD @ phi_MD.T) * rstd_T.unsqueeze(1), rstd_T


def collapse_and_norm(
    x_TNC: Tensor, pre_TN: Tensor, gain_C: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """h and 1/rms of the collapsed streams."""
    u_TC = weighted_sum(pre_TN, x_TNC)
    rstd_T = (u_TC.square().mean(1) + norm_eps).rsqrt()
    return scale(u_TC, rstd_T, gain_C, x_TNC.dtype), rstd_T


def collapse_and_norm_backward(
    x_TNC: Tensor, pre_TN: Tensor, rstd_T: Tensor, gain_C: Tensor, d_h_TC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u (T, C), of the H_pre that was used (T, n) and of the gain (C,)."""
    x_TNC, d_h_TC = x_TNC.to(pre_TN.dtype), d_h_TC.to(pre_TN.dtype)
    unit_TC = weighted_sum(pre_TN, x_TNC) * rstd_T.unsqueeze(1)
    d_unit_TC = d_h_TC * gain_C.to(pre_TN.dtype)
    d_u_TC = (d_unit_TC - unit_TC * (d_unit_TC * unit_TC).mean(1, keepdim=True)) * rstd_T.unsqueeze(1)
    d_pre_TN = (x_TNC * d_u_TC.unsqueeze(1)).sum(2)
    return d_u_TC, d_pre_TN, (d_h_TC * unit_TC).sum(0)


def total_gradient(
    gradient_TNC: Tensor,
    x_TNC: Tensor,
    pre_TN: Tensor,
    d_u_TC: Tensor,
    d_projection_TM: Tensor,
    shrink_T: Tensor,
    phi_MD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of x' from behind, through collapse, projection and norm; and the gradient of phi."""
    exact = pre_TN.dtype
    x_TNC = x_TNC.to(exact)
    through_projection_TNC = (d_projection_TM @ phi_MD).view_as(x_TNC)
    total_TNC = (
        gradient_TNC.to(exact)
        + pre_TN.unsqueeze(2) * d_u_TC.unsqueeze(1)
        + through_projection_TNC
        - shrink_T[:, None, None] * x_TNC
    )
    return total_TNC, d_projection_TM.T @ x_TNC.flatten(1)
