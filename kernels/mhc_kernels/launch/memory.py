"""Tensors as kernels take them: memory for results, rows of a chunk, neighbouring values.

`new_result` is called through this module, so that tests can replace it in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def new_result(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for a kernel's result; the tests replace this by NaN-filled memory."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def rows_of(tensors: Sequence[Tensor | None], rows: slice) -> tuple[Any, ...]:
    """The rows of every tensor; None stays None."""
    return tuple(None if tensor is None else tensor[rows] for tensor in tensors)


def contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def inner_contiguous(tensor_TK: Tensor) -> Tensor:
    """Rows may be apart (a slice of a wider result); within a row the values must be neighbours."""
    return tensor_TK if tensor_TK.stride(-1) == 1 else tensor_TK.contiguous()
