"""Tests in this folder need Triton's interpreter, which is chosen when Triton is imported.

tests/unit/kernels/test_interpreted.py runs them in a process of their own with TRITON_INTERPRET=1; in any
other process this folder has nothing to collect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from mhc_kernels import interpreted
from mhc_kernels.launch import architecture, memory
from mhc_kernels.seam import SeamBackend, make_backend
from mhc_kernels.tiles import Tile, TileSet, tiles_for

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


def nan_filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def quick_tiles(architecture: str, num_streams: int, channels: int, item_bytes: int = 2) -> TileSet:
    """Larger tiles than the table's: the interpreter pays per program and operation, not per element."""
    return _retiled(tiles_for(architecture, num_streams, channels, item_bytes), 64, 128)


def _retiled(tiles: TileSet, tokens: int, channels: int) -> TileSet:
    block, row = Tile(tokens, channels, 4), Tile(tokens, tiles.mix_pre.channels, 4)
    return tiles._replace(
        post_project=block,
        mix_pre=row,
        streams=block,
        backward_dots=row,
        backward_apply=block,
        backward_phi=None if tiles.backward_phi is None else block,
        post_backward=block,
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "new_result", nan_filled)
    monkeypatch.setattr(architecture, "tiles_for", quick_tiles)
    with interpreted.rounded_like_a_device():
        yield


@pytest.fixture
def many_programs(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, where it matters that there are several programs along every axis of the grids."""

    def small_tiles(architecture: str, num_streams: int, channels: int, item_bytes: int = 2) -> TileSet:
        return _retiled(tiles_for(architecture, num_streams, channels, item_bytes), 16, 32)

    monkeypatch.setattr(architecture, "tiles_for", small_tiles)


@pytest.fixture
def backend() -> SeamBackend:
    return make_backend("triton")
