"""One autograd Function per seam, shared by all backends with a hand-written backward.

A seam's backward receives the gradient of the streams it produced from the *next* seam alone and returns the
gradient of the streams it read: no gradients of (T, n, C) size are ever added by autograd. Everything that
backward reads goes through `save_for_backward`, so saved-tensor hooks can drop tensors and supply them again.
A backward by hand has no backward of its own: asking for second derivatives is an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mhc_kernels.ambient import without_autocast, without_second_derivatives
from mhc_kernels.spec import Connection, ConnectionSpec, Seam


class Update(NamedTuple):
    """The tail of sublayer l: what `x' = res x + post y` reads. Absent when a seam opens a chunk."""

    y_TC: Tensor
    post_TN: Tensor
    res_TNN: Tensor | None


class SeamForward(NamedTuple):
    """Results of one seam. `mix_TM` is phi x' / rms(x') (fp32); `projection_rstd_T` is 1/rms(x')."""

    streams_TNC: Tensor
    h_TC: Tensor
    pre_TN: Tensor
    post_TN: Tensor
    res_TNN: Tensor | None
    mix_TM: Tensor
    projection_rstd_T: Tensor
    rstd_T: Tensor

    @property
    def saved(self) -> SeamSaved:
        return SeamSaved(self.streams_TNC, self.pre_TN, self.mix_TM, self.projection_rstd_T, self.rstd_T)


class SeamSaved(NamedTuple):
    """What a backward reads of its forward's results. Neither h nor the collapsed streams are among it, and
    H_post and H_res are formed again where their gradients need them."""

    streams_TNC: Tensor
    pre_TN: Tensor
    mix_TM: Tensor
    projection_rstd_T: Tensor
    rstd_T: Tensor


class SeamGradients(NamedTuple):
    """Gradients that reach a seam from behind. A coefficient that was not used has gradient None."""

    streams_TNC: Tensor
    h_TC: Tensor
    pre_TN: Tensor | None
    post_TN: Tensor
    res_TNN: Tensor | None


class InputGradients(NamedTuple):
    """Gradients of a seam's inputs; fields of an absent `Update` are None."""

    streams_TNC: Tensor
    y_TC: Tensor | None
    post_TN: Tensor | None
    res_TNN: Tensor | None
    carried_pre_TN: Tensor | None
    phi_MD: Tensor
    alpha_3: Tensor
    bias_M: Tensor
    gain_C: Tensor


class SeamOperations(Protocol):
    """What a backend implements: the arithmetic of a seam, without autograd."""

    def seam_forward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
    ) -> SeamForward: ...

    def seam_backward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
        saved: SeamSaved,
        gradients: SeamGradients,
    ) -> InputGradients: ...

    def update_forward(self, streams_TNC: Tensor, update: Update) -> Tensor: ...

    def update_backward(
        self, streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...

    def collapse_forward(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor: ...

    def collapse_backward(
        self, streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class SeamFunction(torch.autograd.Function):
    """streams (and y, post, res of sublayer l) -> streams', h, post, res, pre of sublayer l+1."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        operations: SeamOperations,
        spec: ConnectionSpec,
        streams_TNC: Tensor,
        y_TC: Tensor | None,
        post_TN: Tensor | None,
        res_TNN: Tensor | None,
        carried_pre_TN: Tensor | None,
        phi_MD: Tensor,
        alpha_3: Tensor,
        bias_M: Tensor,
        gain_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        connection = Connection(phi_MD, alpha_3, bias_M, gain_C, spec)
        update = _update(y_TC, post_TN, res_TNN)
        result = operations.seam_forward(streams_TNC, update, connection, carried_pre_TN)
        ctx.operations, ctx.spec = operations, spec
        ctx.save_for_backward(
            *(streams_TNC, y_TC, post_TN, res_TNN, carried_pre_TN),
            *(phi_MD, alpha_3, bias_M, gain_C),
            *result.saved,
        )
        ctx.mark_non_differentiable(result.rstd_T)
        if not spec.shifted_pre:
            ctx.mark_non_differentiable(result.pre_TN)
        return result.streams_TNC, result.h_TC, result.post_TN, result.res_TNN, result.pre_TN, result.rstd_T

    @staticmethod
    @without_second_derivatives
    @without_autocast
    def backward(ctx: Any, *grads: Any) -> Any:
        d_streams_TNC, d_h_TC, d_post_TN, d_res_TNN, d_pre_TN, _ = grads
        streams_TNC, y_TC, post_TN, res_TNN, carried_pre_TN, phi_MD, alpha_3, bias_M, gain_C, *saved = (
            ctx.saved_tensors
        )
        spec: ConnectionSpec = ctx.spec
        gradients = ctx.operations.seam_backward(
            streams_TNC,
            _update(y_TC, post_TN, res_TNN),
            Connection(phi_MD, alpha_3, bias_M, gain_C, spec),
            carried_pre_TN,
            SeamSaved(*saved),
            SeamGradients(
                d_streams_TNC.contiguous(),
                d_h_TC.contiguous(),
                d_pre_TN if spec.shifted_pre else None,
                d_post_TN,
                d_res_TNN,
            ),
        )
        return None, None, *gradients


class UpdateFunction(torch.autograd.Function):
    """x'[o] = sum_i res[o, i] x[i] + post[o] y at a chunk's end."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        operations: SeamOperations,
        streams_TNC: Tensor,
        y_TC: Tensor,
        post_TN: Tensor,
        res_TNN: Tensor | None,
    ) -> Tensor:
        ctx.operations = operations
        ctx.save_for_backward(streams_TNC, y_TC, post_TN, res_TNN)
        return operations.update_forward(streams_TNC, Update(y_TC, post_TN, res_TNN))

    @staticmethod
    @without_second_derivatives
    @without_autocast
    def backward(ctx: Any, *grads: Any) -> Any:
        streams_TNC, y_TC, post_TN, res_TNN = ctx.saved_tensors
        gradients = ctx.operations.update_backward(
            streams_TNC, Update(y_TC, post_TN, res_TNN), grads[0].contiguous()
        )
        return None, *gradients


class CollapseFunction(torch.autograd.Function):
    """sum_i pre[i] x[i], rounded to the streams' dtype."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, operations: SeamOperations, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        ctx.operations = operations
        ctx.save_for_backward(streams_TNC, pre_TN)
        return operations.collapse_forward(streams_TNC, pre_TN)

    @staticmethod
    @without_second_derivatives
    @without_autocast
    def backward(ctx: Any, *grads: Any) -> Any:
        streams_TNC, pre_TN = ctx.saved_tensors
        return None, *ctx.operations.collapse_backward(streams_TNC, pre_TN, grads[0].contiguous())


def run_seam(
    operations: SeamOperations,
    streams_TNC: Tensor,
    update: Update | None,
    connection: Connection,
    carried_pre_TN: Tensor | None,
) -> Seam:
    """Apply SeamFunction. The caller has checked the arguments."""
    y_TC, post_TN, res_TNN = (None, None, None) if update is None else update
    streams_TNC, h_TC, post_TN, res_TNN, pre_TN, rstd_T = SeamFunction.apply(
        operations,
        connection.spec,
        streams_TNC,
        y_TC,
        post_TN,
        res_TNN,
        carried_pre_TN,
        connection.phi_MD,
        connection.alpha_3,
        connection.bias_M,
        connection.gain_C,
    )
    assert post_TN is not None
    return Seam(streams_TNC, h_TC, post_TN, res_TNN, pre_TN, rstd_T)


def _update(y_TC: Tensor | None, post_TN: Tensor | None, res_TNN: Tensor | None) -> Update | None:
    if y_TC is None:
        return None
    assert post_TN is not None
    return Update(y_TC, post_TN, res_TNN)
