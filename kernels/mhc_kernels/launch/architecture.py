"""Whose tiles a launch takes: the device's, or those of the architecture that a CPU stands in for."""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from mhc_kernels.tiles import TileSet, tiles_for

cpu_architecture: ContextVar[str] = ContextVar("cpu_architecture", default="sm_90")
"""Whose tiles kernels on CPU tensors take: they are interpreted, or recorded to be compiled offline."""


def device_architecture(device: torch.device) -> str:
    """Name of the device in the tile table."""
    if device.type == "cpu":
        return cpu_architecture.get()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def tiles_of(streams_TNC: Tensor) -> TileSet:
    """The tiles of these streams on their device."""
    _, n, channels = streams_TNC.shape
    return tiles_for(device_architecture(streams_TNC.device), n, channels, streams_TNC.element_size())


def product_precision(streams_TNC: Tensor, tiles: TileSet) -> str:
    """Input precision of the matrix products."""
    return tiles.precision if streams_TNC.dtype == torch.bfloat16 else "ieee"
