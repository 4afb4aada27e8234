"""What one chunk sends to the next: the streams, and with `residual.shifted_pre` the H_pre to collapse them.

Both travel as one tensor of the streams' dtype. H_pre is fp32 whatever that is, so its bits ride in extra
channels: one per stream in fp32, two in bf16. On the way back the same channels hold its gradient's bits.
Nothing may be computed with such a tensor, and nothing is: a message has one writer and one reader.
"""

from __future__ import annotations

from typing import Any

import torch
from mhc_kernels.dtypes import coefficient_dtype
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.model.hyper_connection import Carried

STREAM_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the streams, by `train.precision`."""


def message_shape(config: RunConfig, dtype: torch.dtype) -> tuple[int, int, int]:
    """(tokens of a microbatch, streams, channels) of what travels between chunks."""
    num_tokens = config.data.sequences_per_microbatch * config.data.sequence_length
    channels = config.model.hidden_size
    if config.residual.shifted_pre:
        channels += coefficient_dtype(dtype).itemsize // dtype.itemsize
    return num_tokens, config.residual.num_streams, channels


def pack(carried: Carried) -> Tensor:
    """The message of a chunk's end, (T, n, C) or a little wider."""
    if carried.pre_TN is None:
        return carried.streams_TNC
    message: Tensor = _Pack.apply(*carried)
    return message


def unpack(message: Tensor, config: RunConfig) -> Carried:
    """What the chunk before packed."""
    if not config.residual.shifted_pre:
        return Carried(message)
    return Carried(*_Unpack.apply(message, config.model.hidden_size))


def _join(streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
    bits_TNX = pre_TN.contiguous().unsqueeze(-1).view(streams_TNC.dtype)
    return torch.cat((streams_TNC, bits_TNX), dim=-1)


def _split(message: Tensor, width: int) -> tuple[Tensor, Tensor]:
    bits_TNX = message[..., width:].contiguous()
    return message[..., :width].contiguous(), bits_TNX.view(coefficient_dtype(message.dtype)).squeeze(-1)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        ctx.width = streams_TNC.shape[-1]
        return _join(streams_TNC, pre_TN)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return _split(grads[0], ctx.width)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return _split(message, width)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        streams_TNC, pre_TN = grads
        return _join(streams_TNC, pre_TN), None
