"""Refuse bad arguments by name, with what came and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_kernels.dtypes import coefficient_dtype
from mhc_kernels.spec import SUPPORTED_STREAMS, Connection, Kept, Mixing

STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CHANNEL_MULTIPLE = 16


def check_streams(streams_TNC: Tensor, dtypes: tuple[torch.dtype, ...] = STREAM_DTYPES) -> None:
    if streams_TNC.dim() != 3:
        raise ValueError(
            f"streams_TNC has shape {tuple(streams_TNC.shape)}: (tokens, streams, channels) is needed"
        )
    num_streams, channels = streams_TNC.shape[1], streams_TNC.shape[2]
    if num_streams not in SUPPORTED_STREAMS:
        raise ValueError(f"streams_TNC has n={num_streams} streams: use one of {SUPPORTED_STREAMS}")
    if channels == 0 or channels % CHANNEL_MULTIPLE:
        raise ValueError(f"streams_TNC has C={channels} channels: a multiple of {CHANNEL_MULTIPLE} is needed")
    if streams_TNC.dtype not in dtypes:
        raise ValueError(f"streams_TNC has dtype {streams_TNC.dtype}: one of {list(dtypes)} is needed")
    if not streams_TNC.is_contiguous():
        raise ValueError(
            f"streams_TNC has strides {streams_TNC.stride()} for shape {tuple(streams_TNC.shape)}: "
            "contiguous streams are needed, call .contiguous() once where they are made"
        )


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {shape} is needed")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}: one of {list(dtypes)} is needed")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, streams_TNC on {like.device}: one device is needed")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: "
            "a contiguous tensor is needed"
        )


def check_connection(streams_TNC: Tensor, connection: Connection, pre_TN: Tensor | None) -> None:
    num_tokens, num_streams, channels = streams_TNC.shape
    spec = connection.spec
    if spec.num_streams != num_streams:
        raise ValueError(
            f"streams_TNC has n={num_streams} streams, connection.spec.num_streams={spec.num_streams}"
        )
    exact = coefficient_dtype(streams_TNC.dtype)
    _check(
        "phi_MD", connection.phi_MD, (spec.num_coefficients, num_streams * channels), (exact,), streams_TNC
    )
    _check("alpha_3", connection.alpha_3, (3,), (exact,), streams_TNC)
    _check("bias_M", connection.bias_M, (spec.num_coefficients,), (exact,), streams_TNC)
    _check("gain_C", connection.gain_C, (channels,), (exact, streams_TNC.dtype), streams_TNC)
    for name in ("phi_MD", "alpha_3", "bias_M", "gain_C"):
        _check_contiguous(name, getattr(connection, name))
    if pre_TN is not None:
        if not spec.shifted_pre:
            raise ValueError("pre_TN was given, but connection.spec.shifted_pre is False: leave it out")
        _check("pre_TN", pre_TN, (num_tokens, num_streams), (exact,), streams_TNC)


def check_update(
    streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None, of: str = ""
) -> None:
    """`of` goes before the names in messages."""
    num_tokens, num_streams, channels = streams_TNC.shape
    exact = coefficient_dtype(streams_TNC.dtype)
    _check(f"{of}y_TC", y_TC, (num_tokens, channels), (streams_TNC.dtype,), streams_TNC)
    _check(f"{of}post_TN", post_TN, (num_tokens, num_streams), (exact,), streams_TNC)
    if res_TNN is not None:
        _check(f"{of}res_TNN", res_TNN, (num_tokens, num_streams, num_streams), (exact,), streams_TNC)


def check_cross(
    streams_TNC: Tensor,
    y_TC: Tensor,
    post_TN: Tensor,
    res_TNN: Tensor | None,
    connection: Connection,
    pre_TN: Tensor | None,
) -> None:
    check_streams(streams_TNC)
    check_update(streams_TNC, y_TC, post_TN, res_TNN)
    check_connection(streams_TNC, connection, pre_TN)
    spec = connection.spec
    if (res_TNN is None) != (spec.mixing is Mixing.IDENTITY):
        came = "None" if res_TNN is None else f"a tensor of shape {tuple(res_TNN.shape)}"
        raise ValueError(
            f"res_TNN is {came}, but mixing={spec.mixing}: None belongs to mixing=identity and only there"
        )
    if spec.shifted_pre and pre_TN is None:
        raise ValueError("shifted_pre needs pre_TN: pass the pre_TN of the previous Seam")


def check_pre(streams_TNC: Tensor, pre_TN: Tensor, of: str = "") -> None:
    _check(
        f"{of}pre_TN",
        pre_TN,
        tuple(streams_TNC.shape[:2]),
        (coefficient_dtype(streams_TNC.dtype),),
        streams_TNC,
    )


def check_block(streams_TNC: Tensor, kept: Sequence[Kept]) -> None:
    check_streams(streams_TNC)
    if not kept:
        raise ValueError("kept is empty: a recompute block holds at least one sublayer")
    num_tokens, _, channels = streams_TNC.shape
    exact = coefficient_dtype(streams_TNC.dtype)
    for index, sublayer in enumerate(kept):
        of = f"kept[{index}]."
        check_pre(streams_TNC, sublayer.pre_TN, of)
        _check(f"{of}rstd_T", sublayer.rstd_T, (num_tokens,), (exact,), streams_TNC)
        _check(f"{of}gain_C", sublayer.gain_C, (channels,), (exact, streams_TNC.dtype), streams_TNC)
        for name in ("rstd_T", "gain_C"):
            _check_contiguous(of + name, getattr(sublayer, name))
        if index + 1 < len(kept):
            if sublayer.y_TC is None:
                raise ValueError(f"{of}y_TC is None: only the last of the {len(kept)} sublayers may lack it")
            check_update(streams_TNC, sublayer.y_TC, sublayer.post_TN, sublayer.res_TNN, of)
            if (sublayer.res_TNN is None) != (kept[0].res_TNN is None):
                came = ("a tensor", "None")[sublayer.res_TNN is None]
                raise ValueError(
                    f"{of}res_TNN is {came}, kept[0].res_TNN is not: None belongs to mixing=identity, and"
                    " all sublayers of a block are mixed alike"
                )
