"""`compiled`: the stream-sized formulas through torch.compile. Opt-in: first calls compile for a while."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mhc_kernels import token_last, whole_tensor
from mhc_kernels.seam_function import InputGradients, SeamForward, SeamGradients, SeamSaved, Update
from mhc_kernels.spec import Connection, Kept, Regenerated


def why_unavailable() -> str | None:
    """Reason and remedy when torch.compile cannot build CPU code here, else None."""
    if any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return None
    return "torch.compile needs g++, clang++ or c++ and finds none on PATH: install one or use `cpu`"


def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """`formula` through torch.compile, given detached tensors: whether an argument is a parameter or needs a
    gradient would otherwise make training, evaluation and recompute compile each for itself."""
    compiled = torch.compile(formula, fullgraph=True)

    def call(*arguments: Any) -> Any:
        return compiled(*tree_map_only(Tensor, Tensor.detach, arguments))

    return call


class CompiledOperations:
    """Each formula of whole_tensor is one compiled graph; between them stand the coefficients."""

    def __init__(self) -> None:
        self._update = _compiled(whole_tensor.update)
        self._update_backward = _compiled(whole_tensor.update_backward)
        self._project = _compiled(whole_tensor.project)
        self._collapse_and_norm = _compiled(whole_tensor.collapse_and_norm)
        self._collapse_and_norm_backward = _compiled(whole_tensor.collapse_and_norm_backward)
        self._total_gradient = _compiled(whole_tensor.total_gradient)
        self._weighted_sum = _compiled(whole_tensor.weighted_sum)
        self._scale = _compiled(whole_tensor.scale)

    def seam_forward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
    ) -> SeamForward:
        spec = connection.spec
        out_TNC = streams_TNC if update is None else self._update(streams_TNC, update)
        mix_TM, rstd_x_T = self._project(out_TNC, connection.phi_MD, spec.projection_norm_eps)
        own = token_last.coefficients(mix_TM, connection.alpha_3, connection.bias_M, spec)
        used_pre_TN = own.pre_TN if carried_pre_TN is None else carried_pre_TN
        u_TC, rstd_T = self._collapse_and_norm(
            out_TNC, used_pre_TN, connection.gain_C, spec.sublayer_norm_eps
        )
        return SeamForward(out_TNC, u_TC, own.pre_TN, own.post_TN, own.res_TNN, mix_TM, rstd_x_T, rstd_T)

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
        _, num_streams, channels = streams_TNC.shape
        pre_TN = saved.pre_TN if carried_pre_TN is None else carried_pre_TN
        d_u_TC, d_used_pre_TN, d_gain_C = self._collapse_and_norm_backward(
            saved.streams_TNC, pre_TN, saved.rstd_T, connection.gain_C, gradients.h_TC
        )
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
        projection = token_last.projection_gradient(
            coefficients.mix_TM, saved.mix_TM, saved.projection_rstd_T, num_streams * channels
        )
        total_TNC, d_phi_MD = self._total_gradient(
            gradients.streams_TNC,
            saved.streams_TNC,
            pre_TN,
            d_u_TC,
            projection.projection_TM,
            projection.shrink_T,
            connection.phi_MD,
        )
        behind = (d_phi_MD, coefficients.alpha_3, coefficients.bias_M, d_gain_C.to(connection.gain_C.dtype))
        if update is None:
            return InputGradients(
                total_TNC.to(streams_TNC.dtype), None, None, None, routed.carried_TN, *behind
            )
        ahead = self.update_backward(streams_TNC, update, total_TNC)
        return InputGradients(*ahead, routed.carried_TN, *behind)

    def update_forward(self, streams_TNC: Tensor, update: Update) -> Tensor:
        return cast(Tensor, self._update(streams_TNC, update))

    def update_backward(
        self, streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        d_streams_TNC, d_y_TC, d_post_TN, d_res_TNN = self._update_backward(streams_TNC, update, gradient_TNC)
        return d_streams_TNC, d_y_TC, d_post_TN, d_res_TNN

    def collapse_forward(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        return cast(Tensor, self._weighted_sum(pre_TN, streams_TNC)).to(streams_TNC.dtype)

    def collapse_backward(
        self, streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_u_T1C = gradient_TC.to(pre_TN.dtype).unsqueeze(1)
        d_pre_TN = (streams_TNC.to(pre_TN.dtype) * d_u_T1C).sum(2)
        return (pre_TN.unsqueeze(2) * d_u_T1C).to(streams_TNC.dtype), d_pre_TN

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        regenerated: list[Regenerated] = []
        for index, sublayer in enumerate(kept):
            u_TC = self._weighted_sum(sublayer.pre_TN, streams_TNC)
            h_TC = self._scale(u_TC, sublayer.rstd_T, sublayer.gain_C, streams_TNC.dtype)
            regenerated.append(Regenerated(streams_TNC, h_TC))
            if index + 1 < len(kept):
                assert sublayer.y_TC is not None
                update = Update(sublayer.y_TC, sublayer.post_TN, sublayer.res_TNN)
                streams_TNC = self._update(streams_TNC, update)
        return regenerated
