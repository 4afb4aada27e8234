"""Counted bytes of the kernels against the closed formulas, and the counter against known offenders."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from mhc_kernels import formula, interpreted, traffic
from mhc_kernels.device.reduce_partials import reduce_partials_kernel
from mhc_kernels.launch import architecture
from mhc_kernels.launch.reduce_partials import reduce_partials
from mhc_kernels.launch.sizes import TokenSplits
from mhc_kernels.seam import ConnectionSpec, Mixing
from mhc_kernels.tiles import Tile, TileSet, tiles_for

CHANNELS = 64


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays per program; the number of tokens per row program does not change unique bytes."""

    def quick_tiles(architecture: str, num_streams: int, channels: int, item_bytes: int = 2) -> TileSet:
        tiles = tiles_for(architecture, num_streams, channels, item_bytes)
        row = tiles.mix_pre.channels
        return tiles._replace(mix_pre=Tile(16, row, 4), backward_dots=Tile(16, row, 4))

    monkeypatch.setattr(architecture, "tiles_for", quick_tiles)
    monkeypatch.setattr(traffic, "TOKEN_COUNTS", (16, 32))


@functools.cache
def measured(num_streams: int, mixing: Mixing, channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """The report at few Sinkhorn iterations, which happen in registers and move nothing."""
    spec = ConnectionSpec(num_streams=num_streams, mixing=mixing, sinkhorn_iterations=2)
    return traffic.measure(channels, spec, dtype)


def check_formula(num_streams: int, mixing: Mixing, dtype: torch.dtype) -> None:
    """forward: x, y in, x' out, x' in, h out = 3n+2. backward: x', dh; g, dh, x, y in, dx, dy out = 4n+4, and
    x' once more for dphi at n = 8. recompute of one sublayer more: y in, x' and h out = n+2."""
    report = measured(num_streams, mixing, CHANNELS, dtype)
    streams = {name: phase["streams"] for name, phase in report["phases"].items()}
    n = num_streams
    backward = 4 * n + 4 + (n if n == 8 else 0)
    assert streams == {"forward": 3 * n + 2, "backward": backward, "recompute": n + 2}
    item = dtype.itemsize
    tiles = architecture.tiles_for("sm_90", n, CHANNELS, item)
    spec = ConnectionSpec(num_streams=n, mixing=mixing)
    expected = {
        "forward": formula.forward(CHANNELS, spec, tiles, item),
        "backward": formula.backward(CHANNELS, spec, tiles, item, TokenSplits(1, 1)),
        "recompute": formula.recompute(CHANNELS, spec, item),
    }
    for name, moved in expected.items():
        assert report[name] * CHANNELS * item == moved.per_token, name


def test_streams_move_as_often_as_the_formula_says() -> None:
    """Oracle: the formulas 3n+2, 4n+4, n+2."""
    check_formula(4, Mixing.SINKHORN, torch.bfloat16)


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "mixing"),
    [(2, Mixing.SINKHORN), (8, Mixing.SINKHORN), (4, Mixing.IDENTITY), (4, Mixing.PERMUTATIONS)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_formula_of_other_connections(n: int, mixing: Mixing, dtype: torch.dtype) -> None:
    """Oracle: the formulas 3n+2, 4n+4, n+2."""
    check_formula(n, mixing, dtype)


def test_everything_counted_is_below_the_promise() -> None:
    """Oracle: the project's promise, 14.5 + 24 + 6.2 C with all coefficients, extrapolated to C = 1280 from
    two widths: bytes per token that are not streams are a constant, but for the partial dots."""
    narrow = measured(4, Mixing.SINKHORN, CHANNELS, torch.bfloat16)
    wide = measured(4, Mixing.SINKHORN, 2 * CHANNELS, torch.bfloat16)
    promises = {"forward": 14.5, "backward": 24.0, "recompute": 6.2}
    for name, promise in promises.items():
        bytes_narrow = narrow[name] * CHANNELS * 2
        bytes_per_channel = wide[name] * 4 - narrow[name] * 2
        at_1280 = (bytes_narrow + (1280 - CHANNELS) * bytes_per_channel) / (1280 * 2)
        assert at_1280 <= promise, (name, at_1280)
    assert not any(narrow["torch_operations"].values())


@pytest.mark.parametrize("shifted_pre", [False, pytest.param(True, marks=pytest.mark.long)])
def test_chunks_read_the_streams_once(shifted_pre: bool) -> None:
    """Oracle: the formulas 2n+2 (x, y in, x', h out) and 3n+3 (x, y, g, dh in, dx, dy out) and what is not
    streams, of which the partial sums between kernels may stay in the cache. C is small here, so a tenth is
    allowed for sectors of which only a part is used."""
    spec = ConnectionSpec(num_streams=4, sinkhorn_iterations=2, shifted_pre=shifted_pre)
    counted = traffic.chunked_bytes(CHANNELS, spec, torch.bfloat16, (64, 128))
    n, row, tiles = 4, 2 * CHANNELS, architecture.tiles_for("sm_90", 4, CHANNELS)
    promises = {
        "forward": ((2 * n + 2) * row, formula.forward(CHANNELS, spec, tiles, 2)),
        "backward": (
            (3 * n + 3) * row,
            formula.backward(CHANNELS, spec, tiles, 2, TokenSplits(1, 1)),
        ),
    }
    for name, (streams, moved) in promises.items():
        # Temporaries live where others have been; how many of their writes meet in the cache depends on it.
        assert 0.98 * streams <= counted[name] * row, name
        assert counted[name] * row <= 1.1 * (streams + moved.coefficients + moved.partials), name


def test_cache_model_counts_misses_and_write_backs() -> None:
    """Oracle: by hand, for a cache of two sectors."""
    cache = interpreted.CacheModel(2 * 32)
    a, b, c = (np.arange(start, start + 32, 4) for start in (0, 32, 64))
    for sector, store in ((a, False), (b, True), (a, False), (c, False), (b, False)):
        cache.access(sector, store=store)
    assert (cache.loaded_bytes, cache.stored_bytes) == (3 * 32, 32)  # b was written back and read again
    cache.access(a, store=True)
    cache.flush()
    assert (cache.loaded_bytes, cache.stored_bytes) == (3 * 32, 2 * 32)


@triton.jit
def out_of_bounds(pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, BLOCK)
    tl.store(pointer + offsets, offsets.to(tl.float32), mask=offsets <= size)


@triton.jit
def atomic(pointer, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.atomic_add(pointer + tl.arange(0, BLOCK), 1.0)


def test_offsets_of_partial_sums_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: arithmetic. Three partial sums of 1.6e9 elements each are not in this memory, but the addresses
    that the kernel asks for are known: 32 bits would wrap."""
    asked, size, block = [], 3 << 29, 1024
    builder = interpreted.interpreter.interpreter_builder

    def note(pointers: Any, mask: Any, *_: Any) -> Any:
        asked.append(int(pointers.data.min()))
        return interpreted.interpreter.TensorHandle(np.zeros(block, dtype=np.float32), tl.float32)

    monkeypatch.setattr(builder, "create_masked_load", note)
    partial = torch.zeros(16)
    reduce_partials_kernel[(1,)](partial, torch.zeros(block), 3, size, BLOCK=block)
    assert asked == [partial.data_ptr() + 4 * k * size for k in range(3)]


@pytest.mark.parametrize(("count", "size"), [(1, 48), (300, 48), (129, 80), (20, 1000), (3, 1100)])
def test_partial_sums(count: int, size: int) -> None:
    """Oracle: torch's sum in fp64; several groups, columns beyond one tile, and both kernels."""
    partial = torch.randn(count, size)
    with interpreted.counted_traffic() as counter:
        total = reduce_partials(partial)
    assert {one.kernel for one in counter.launches} == {"reduce_rows" if size <= 1024 else "reduce_partials"}
    assert total.shape == (size,)
    torch.testing.assert_close(total.double(), partial.double().sum(0), rtol=1e-5, atol=1e-5)


def test_a_stray_store_is_caught() -> None:
    """Oracle: a kernel with an off-by-one mask; the memory around its argument is ours."""
    memory = torch.zeros(64)
    with interpreted.counted_traffic(), pytest.raises(Exception, match="outside of its arguments"):
        out_of_bounds[(1,)](memory[:15], 15, BLOCK=32)


def test_an_atomic_is_caught() -> None:
    """Oracle: a kernel with an atomic add."""
    with interpreted.counted_traffic(), pytest.raises(Exception, match="atomic operation"):
        atomic[(1,)](torch.zeros(16), BLOCK=16)


def test_torch_operations_around_kernels_are_counted() -> None:
    """Oracle: arithmetic; y = x + x reads two and writes one array of 4000 bytes."""
    x = torch.ones(1000)
    with interpreted.counted_traffic() as counter, interpreted.TorchTrafficMode(counter) as mode:
        _ = x + x
        _ = x.view(10, 100)
    assert mode.moved == {"add.Tensor": 12000}
