"""B3: partial results become sums, in a fixed order."""

from __future__ import annotations

import math

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mhc_kernels.device.reduce_partials import reduce_partials_kernel, reduce_rows_kernel
from mhc_kernels.launch import memory

REDUCE_BLOCK = 1024
REDUCE_ROWS, REDUCE_COLUMNS = 128, 64
"""Tile of sums over many partials of at most REDUCE_BLOCK elements."""


def reduce_partials(partial: Tensor, out: Tensor | None = None) -> Tensor:
    """B3: the sum over the first dimension, in a fixed order."""
    size = math.prod(partial.shape[1:])
    if out is None and size <= REDUCE_BLOCK:
        return _reduce_rows(partial)
    if out is None:
        out = memory.new_result(partial.shape[1:], torch.float32, partial.device)
    reduce_partials_kernel[(triton.cdiv(size, REDUCE_BLOCK),)](
        partial, out, partial.shape[0], size, BLOCK=REDUCE_BLOCK, num_warps=4
    )
    return out


def _reduce_rows(partial: Tensor) -> Tensor:
    """The same of few elements: groups of partials side by side, then the groups' sums."""
    while True:
        count, size = partial.shape[0], math.prod(partial.shape[1:])
        groups = max(1, triton.cdiv(count, REDUCE_ROWS))
        out = memory.new_result((groups, *partial.shape[1:]), torch.float32, partial.device)
        grid = (triton.cdiv(size, REDUCE_COLUMNS), groups)
        reduce_rows_kernel[grid](
            partial, out, count, size, ROWS=REDUCE_ROWS, BLOCK=REDUCE_COLUMNS, num_warps=8
        )
        if groups == 1:
            return out[0]
        partial = out
