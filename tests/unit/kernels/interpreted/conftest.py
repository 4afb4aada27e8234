"""Tests in this folder need Triton's interpreter, which is chosen when Triton is imported.

tests/unit/kernels/test_interpreted.py runs each file in a process of its own with TRITON_INTERPRET=1; in any
other process this folder has nothing to collect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from mhc_kernels import interpreted, launch
from mhc_kernels.seam import SeamBackend, make_backend
from mhc_kernels.tiles import Tile, TileSet, tiles_for

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


def nan_filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def quick_tiles(architecture: str, num_streams: int, channels: int) -> TileSet:
    """The table's tiles with more tokens per row program: the interpreter pays per program."""
    tiles = tiles_for(architecture, num_streams, channels)
    return tiles._replace(
        mix_pre=Tile(16, tiles.mix_pre.channels, 4), backward_dots=Tile(16, tiles.backward_dots.channels, 4)
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "new_result", nan_filled)
    monkeypatch.setattr(launch, "tiles_for", quick_tiles)
    with interpreted.rounded_like_a_device():
        yield


@pytest.fixture
def backend() -> SeamBackend:
    return make_backend("triton")
