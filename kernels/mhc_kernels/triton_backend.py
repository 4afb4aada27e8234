"""`triton`: the kernels as torch.library operations with fake kernels, behind the shared autograd Functions.

The operations make the launches opaque to tracers: shapes come from the fake kernels, and neither
torch.compile nor a fake tensor mode has to understand Triton. An operation takes tensors and numbers only and
returns fresh tensors, so optional tensors travel as empty ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_kernels import tiles
from mhc_kernels.launch import backward, ends, forward, recompute
from mhc_kernels.launch.architecture import device_architecture
from mhc_kernels.offline import interpreting
from mhc_kernels.seam_function import InputGradients, SeamForward, SeamGradients, SeamSaved, Update
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing, Regenerated
from mhc_kernels.tiles import ARCHITECTURES

_decoded = functools.cache(ConnectionSpec.decoded)


def _update(y_TC: Tensor | None, post_TN: Tensor | None, res_TNN: Tensor | None) -> Update | None:
    return None if y_TC is None or post_TN is None else Update(y_TC, post_TN, res_TNN)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _results_like(inputs: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """What the fake kernels promise of gradients: contiguous, whatever the strides of the inputs; empty for
    those that are absent."""
    return [_empty(like) if i is None else i.new_empty(i.shape) for i in inputs]


def _all_present(gradients: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    return [_empty(like) if gradient is None else gradient for gradient in gradients]


def _or_none(tensor: Tensor) -> Tensor | None:
    """The inverse of `_empty`, which is one-dimensional; a result for no tokens is not."""
    return tensor if tensor.dim() > 1 else None


@torch.library.custom_op("mhc_kernels::seam_forward", mutates_args=())
def seam_forward(
    streams_TNC: Tensor,
    y_TC: Tensor | None,
    post_TN: Tensor | None,
    res_TNN: Tensor | None,
    carried_pre_TN: Tensor | None,
    phi_MD: Tensor,
    alpha_3: Tensor,
    bias_M: Tensor,
    gain_C: Tensor,
    spec: str,
    chunk_tokens: int,
) -> list[Tensor]:
    """[x' (empty without update), h, pre, post, res (empty for identity), mix, 1/rms(x'), 1/rms(u)]."""
    connection = Connection(phi_MD, alpha_3, bias_M, gain_C, _decoded(spec))
    update = _update(y_TC, post_TN, res_TNN)
    result = forward.seam_forward(streams_TNC, update, connection, carried_pre_TN, chunk_tokens)
    out_TNC = _empty(streams_TNC) if y_TC is None else result.streams_TNC
    res = _empty(phi_MD) if result.res_TNN is None else result.res_TNN
    return [out_TNC, *result[1:4], res, *result[5:]]


@seam_forward.register_fake
def _(streams_TNC: Tensor, y_TC: Tensor | None, *others: Any) -> list[Tensor]:
    num_tokens, n, channels = streams_TNC.shape
    *_, phi_MD, _alpha_3, _bias_M, _gain_C, spec, _chunk_tokens = others
    no_res = _decoded(spec).mixing is Mixing.IDENTITY
    return [
        _empty(streams_TNC) if y_TC is None else torch.empty_like(streams_TNC),
        streams_TNC.new_empty(num_tokens, channels),
        phi_MD.new_empty(num_tokens, n),
        phi_MD.new_empty(num_tokens, n),
        _empty(phi_MD) if no_res else phi_MD.new_empty(num_tokens, n, n),
        phi_MD.new_empty(num_tokens, phi_MD.shape[0]),
        phi_MD.new_empty(num_tokens),
        phi_MD.new_empty(num_tokens),
    ]


@torch.library.custom_op("mhc_kernels::seam_backward", mutates_args=())
def seam_backward(
    streams_TNC: Tensor,
    y_TC: Tensor | None,
    post_TN: Tensor | None,
    res_TNN: Tensor | None,
    carried_pre_TN: Tensor | None,
    phi_MD: Tensor,
    alpha_3: Tensor,
    bias_M: Tensor,
    gain_C: Tensor,
    saved: Sequence[Tensor],
    d_streams_TNC: Tensor,
    d_h_TC: Tensor,
    d_pre_TN: Tensor | None,
    d_post_TN: Tensor,
    d_res_TNN: Tensor | None,
    spec: str,
    chunk_tokens: int,
) -> list[Tensor]:
    """Gradients of streams, y, post, res, carried pre, phi, alpha, bias, gain; empty without an input.

    `saved` are the fields of SeamSaved; x' is empty without an update, where the streams are x'.
    """
    x_TNC, *others = saved
    x_TNC = streams_TNC if y_TC is None else x_TNC
    gradients = backward.seam_backward(
        streams_TNC,
        _update(y_TC, post_TN, res_TNN),
        Connection(phi_MD, alpha_3, bias_M, gain_C, _decoded(spec)),
        carried_pre_TN,
        SeamSaved(x_TNC, *others),
        SeamGradients(d_streams_TNC, d_h_TC, d_pre_TN, d_post_TN, d_res_TNN),
        chunk_tokens,
    )
    return _all_present(gradients, phi_MD)


@seam_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return _results_like(arguments[:9], like=arguments[5])


@torch.library.custom_op("mhc_kernels::update_forward", mutates_args=())
def update_forward(streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
    return ends.update_forward(streams_TNC, Update(y_TC, post_TN, res_TNN))


@update_forward.register_fake
def _(streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
    return torch.empty_like(streams_TNC)


@torch.library.custom_op("mhc_kernels::update_backward", mutates_args=())
def update_backward(
    streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None, gradient_TNC: Tensor
) -> list[Tensor]:
    gradients = ends.update_backward(streams_TNC, Update(y_TC, post_TN, res_TNN), gradient_TNC)
    return _all_present(gradients, post_TN)


@update_backward.register_fake
def _(
    streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None, gradient_TNC: Tensor
) -> list[Tensor]:
    return _results_like((streams_TNC, y_TC, post_TN, res_TNN), like=post_TN)


@torch.library.custom_op("mhc_kernels::collapse_forward", mutates_args=())
def collapse_forward(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    return ends.collapse_forward(streams_TNC, pre_TN)


@collapse_forward.register_fake
def _(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    return streams_TNC.new_empty(streams_TNC.shape[0], streams_TNC.shape[2])


@torch.library.custom_op("mhc_kernels::collapse_backward", mutates_args=())
def collapse_backward(streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor) -> list[Tensor]:
    return list(ends.collapse_backward(streams_TNC, pre_TN, gradient_TC))


@collapse_backward.register_fake
def _(streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor) -> list[Tensor]:
    return _results_like((streams_TNC, pre_TN), like=pre_TN)


@torch.library.custom_op("mhc_kernels::recompute_block", mutates_args=())
def recompute_block(
    streams_TNC: Tensor,
    pres: Sequence[Tensor],
    rstds: Sequence[Tensor],
    gains: Sequence[Tensor],
    posts: Sequence[Tensor],
    ress: Sequence[Tensor],
    ys: Sequence[Tensor],
) -> list[Tensor]:
    """[every h, then the streams of every sublayer but the first]. The last sublayer needs no post, res, y;
    `ress` is empty for identity."""
    inner = len(ys)
    kept = [
        Kept(pres[k], rstds[k], gains[k], posts[k], ress[k] if ress else None, ys[k]) for k in range(inner)
    ]
    kept.append(Kept(pres[inner], rstds[inner], gains[inner], pres[inner], None, None))
    regenerated = recompute.recompute_block(streams_TNC, kept)
    return [*(one.h_TC for one in regenerated), *(one.streams_TNC for one in regenerated[1:])]


@recompute_block.register_fake
def _(streams_TNC: Tensor, pres: Sequence[Tensor], *others: Any) -> list[Tensor]:
    num_tokens, _, channels = streams_TNC.shape
    h_LTC = [streams_TNC.new_empty(num_tokens, channels) for _ in pres]
    return [*h_LTC, *(torch.empty_like(streams_TNC) for _ in pres[1:])]


class TritonOperations:
    """SeamOperations over the registered operations.

    `chunked`: launch the kernels of a seam in turn on chunks of tokens whose rows stay in the second-level
    cache between them.
    """

    def __init__(self, *, chunked: bool = False) -> None:
        self._chunked = chunked

    def _chunk_tokens(self, streams_TNC: Tensor) -> int:
        if not self._chunked:
            return 0
        architecture = device_architecture(streams_TNC.device)
        _, n, channels = streams_TNC.shape
        return tiles.chunk_tokens(architecture, n, channels, streams_TNC.element_size())

    def seam_forward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
    ) -> SeamForward:
        tail = update or (None, None, None)
        x_TNC, h_TC, pre, post, res, mix, rstd_x, rstd_h = seam_forward(
            streams_TNC,
            *tail,
            carried_pre_TN,
            *connection[:4],
            connection.spec.encoded,
            self._chunk_tokens(streams_TNC),
        )
        x_TNC = streams_TNC if update is None else x_TNC
        return SeamForward(x_TNC, h_TC, pre, post, _or_none(res), mix, rstd_x, rstd_h)

    def seam_backward(
        self,
        streams_TNC: Tensor,
        update: Update | None,
        connection: Connection,
        carried_pre_TN: Tensor | None,
        saved: SeamSaved,
        gradients: SeamGradients,
    ) -> InputGradients:
        tail = update or (None, None, None)
        x_TNC = _empty(streams_TNC) if update is None else saved.streams_TNC
        d_streams, d_y, d_post, d_res, d_carried, *parameters = seam_backward(
            streams_TNC,
            *tail,
            carried_pre_TN,
            *connection[:4],
            [x_TNC, *saved[1:]],
            *gradients,
            connection.spec.encoded,
            self._chunk_tokens(streams_TNC),
        )
        return InputGradients(
            d_streams,
            None if update is None else d_y,
            None if update is None else d_post,
            None if update is None or update.res_TNN is None else d_res,
            None if carried_pre_TN is None else d_carried,
            *parameters,
        )

    def update_forward(self, streams_TNC: Tensor, update: Update) -> Tensor:
        out_TNC: Tensor = update_forward(streams_TNC, *update)
        return out_TNC

    def update_backward(
        self, streams_TNC: Tensor, update: Update, gradient_TNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        d_streams, d_y, d_post, d_res = update_backward(streams_TNC, *update, gradient_TNC)
        return d_streams, d_y, d_post, None if update.res_TNN is None else d_res

    def collapse_forward(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        out_TC: Tensor = collapse_forward(streams_TNC, pre_TN)
        return out_TC

    def collapse_backward(
        self, streams_TNC: Tensor, pre_TN: Tensor, gradient_TC: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_streams, d_pre = collapse_backward(streams_TNC, pre_TN, gradient_TC)
        return d_streams, d_pre

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        inner = kept[:-1]
        results: list[Tensor] = recompute_block(
            streams_TNC,
            *([getattr(one, name) for one in kept] for name in ("pre_TN", "rstd_T", "gain_C")),
            *(
                [tensor for one in inner if (tensor := getattr(one, name)) is not None]
                for name in ("post_TN", "res_TNN", "y_TC")
            ),
        )
        h_LTC, later_LTNC = results[: len(kept)], results[len(kept) :]
        return [Regenerated(*one) for one in zip([streams_TNC, *later_LTNC], h_LTC, strict=True)]


def why_unavailable() -> str | None:
    """Reason and remedy when the kernels cannot run in this process, else None."""
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return (
            "torch sees no GPU. On CPUs use `cpu` or `compiled`; to run the kernels in Triton's interpreter "
            "(slow, for tests) start Python with TRITON_INTERPRET=1"
        )
    architecture = device_architecture(torch.device("cuda"))
    if architecture not in ARCHITECTURES:
        return f"the GPU is {architecture}, tiles.py has {', '.join(ARCHITECTURES)}: add a row for it"
    return None


def check_device(streams_TNC: Tensor) -> None:
    needed = "cpu" if interpreting() else "cuda"
    if streams_TNC.device.type != needed:
        raise ValueError(f"streams_TNC is on {streams_TNC.device}, backend `triton` runs on {needed} here")
    if streams_TNC.dtype == torch.float64:
        raise ValueError(
            "streams_TNC has dtype torch.float64, backend `triton` takes torch.float32 or torch.bfloat16"
        )
