"""Offline compilation and its report; in a process of its own only where the interpreter must be off."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from mhc_kernels import offline, resources
from mhc_kernels.seam import ConnectionSpec, make_backend
from mhc_kernels.tiles import ARCHITECTURES, WIDTH_BUCKETS, chunk_tokens, tiles_for

SPEC = ConnectionSpec(num_streams=4)
TOKEN_KERNELS = {"unpermute", "unpermute_backward", "swiglu", "swiglu_backward"}
KERNELS = {
    "project",
    "post_project",
    "mix_pre",
    "backward_dots",
    "backward_apply",
    "project_backward",
    "reduce_partials",
    "reduce_rows",
    "post",
    "post_backward",
    "pre",
    "pre_backward",
    "recompute_block",
    "backward_dots_chunked",
    "backward_apply_chunked",
    "project_backward_chunked",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_chunk_launches_every_kernel_of_the_set(architecture: str) -> None:
    """Oracle: the list of kernels in the documentation; at n = 8 the sums of dphi have a kernel of their own,
    which goes on from chunk to chunk."""
    launches = offline.seam_launches(architecture, 1280, SPEC, num_tokens=130)
    assert {launched.name for launched in launches} == KERNELS
    launches = offline.token_launches(architecture, 1280, torch.bfloat16)
    assert {launched.name for launched in launches} == TOKEN_KERNELS
    launches = offline.seam_launches(architecture, 1280, ConnectionSpec(num_streams=8), num_tokens=130)
    assert {launched.name for launched in launches} == KERNELS - {
        "backward_apply",
        "backward_apply_chunked",
    } | {*("backward_streams", "backward_streams_chunked", "backward_phi", "backward_phi_chunked")}


def test_recording_ends_with_its_context() -> None:
    """Oracle: Triton's own launcher, which must be back afterwards."""
    run = offline.JITFunction.run
    with offline.recorded_launches("sm_90"):
        assert offline.JITFunction.run is not run
    assert offline.JITFunction.run is run


@pytest.mark.parametrize(
    "name", ["post", "mix_pre", pytest.param("project_backward", marks=pytest.mark.long)]
)
def test_small_kernels_compile_for_hopper(name: str) -> None:
    """Oracle: disassembly by the vendor's tools: nothing spilled, no atomics, 128-bit accesses."""
    (report,) = resources.kernel_resources("sm_90", 1280, SPEC, torch.bfloat16, only=name)
    check_fits(report, "sm_90")
    assert report.spills == report.atomics == 0
    assert 0 < report.registers <= 255


@triton.jit
def adding(sum_ptr, x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(sum_ptr + offsets, tl.load(x_ptr + offsets), sem="relaxed")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_atomic_is_found_in_machine_code(architecture: str) -> None:
    """Oracle: a kernel that adds atomically and takes no result, which has an instruction of its own."""
    arguments = {"sum_ptr": torch.empty(256), "x_ptr": torch.empty(256), "BLOCK": 256}
    launched = offline.RecordedLaunch(adding, (1,), arguments, {"num_warps": 4})
    read = resources.amd_resources if architecture == "gfx942" else resources.nvidia_resources
    report = read(launched, 256, offline.compile_for(launched, architecture))
    assert report.atomics > 0
    assert any("atomics" in reason for reason in report.misfits(architecture))


def test_which_products_are_fused_is_not_left_to_the_compiler() -> None:
    """Oracle: the compiler's intermediate code of the kernels that form x' and h again: with no plain sum in
    it, nothing in them can be rounded otherwise than in the forward."""
    for launched in offline.seam_launches("sm_90", 64, SPEC, num_tokens=64):
        if launched.name in ("post", "recompute_block"):
            code = offline.compile_for(launched, "sm_90").asm["llir"]
            assert "llvm.fma" in code
            assert " fadd " not in code


def check_fits(report: resources.KernelResources, architecture: str) -> None:
    """Nothing spilled, no atomics, no more memory than there is; 128-bit accesses on NVIDIA's devices."""
    assert report.misfits(architecture) == [], report
    assert report.vector_bytes == 16 or architecture == "gfx942", report


def test_what_does_not_fit_is_told() -> None:
    """Oracle: a kernel that fits, changed in one property; the reason names the figure and the limit."""
    fits = resources.KernelResources("post", 1280, {}, 128, 4096, 0, 0, 16, {"LDG.E.128": 4}, 512)
    assert fits.misfits("sm_100") == []
    for changed, reason in (
        ({"spills": 7}, "7 spilled accesses"),
        ({"atomics": 1}, "1 global atomics"),
        ({"shared_bytes": 471040}, "471040 bytes of shared memory, a program can have 232448"),
        ({"tensor_memory": 544}, "544 columns of tensor memory, a program can have 512"),
        ({"accesses": {}}, "the compiler gave up"),
    ):
        (told,) = replace(fits, **changed).misfits("sm_100")
        assert reason in told


def test_unknown_names_are_refused() -> None:
    """Oracle: the contract; a report about nothing would look like one without complaints."""
    with pytest.raises(ValueError, match=r"kernel 'mix' is not launched here: use one of project, mix_pre"):
        resources.kernel_resources("sm_90", 1280, SPEC, torch.bfloat16, only="mix")
    with pytest.raises(ValueError, match="C=24 channels: a multiple of 16"):
        resources.kernel_resources("sm_90", 24, SPEC, torch.bfloat16)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("channels", [1280, 2560, 4096, 7168])
def test_every_kernel_fits(architecture: str, channels: int) -> None:
    """Oracle: disassembly by the vendor's tools, at every promised width."""
    for report in resources.kernel_resources(architecture, channels, SPEC, torch.bfloat16):
        check_fits(report, architecture)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize(("n", "channels"), [(2, 192), (4, 16), (4, 1280), (4, 7168)])
def test_every_kernel_fits_with_streams_in_fp32(architecture: str, n: int, channels: int) -> None:
    """Oracle: disassembly by the vendor's tools. Accesses may be narrower than 128 bits, and the widest rows
    spill in chunks."""
    for report in resources.kernel_resources(architecture, channels, ConnectionSpec(n), torch.float32):
        if (channels, report.name) != (7168, "backward_dots_chunked"):
            assert report.misfits(architecture) == [], report


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_every_kernel_fits_at_eight_streams(architecture: str) -> None:
    """Oracle: disassembly by the vendor's tools."""
    for report in resources.kernel_resources(architecture, 1280, ConnectionSpec(8), torch.bfloat16):
        check_fits(report, architecture)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_kernel_compiles_for_amd() -> None:
    """Oracle: the assembly of the AMD compiler: nothing spilled, no atomics."""
    for report in resources.kernel_resources("gfx942", 1280, SPEC, torch.bfloat16):
        check_fits(report, "gfx942")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels", [16, 1280, 7168])
def test_chunks_hold_whole_tiles(architecture: str, channels: int) -> None:
    """Oracle: the tile table; a chunk that ends within a tile would move every tile after it."""
    for n in (2, 4, 8):
        tokens = chunk_tokens(architecture, n, channels, item_bytes=2)
        tiles = tiles_for(architecture, n, channels)
        for tile in (tiles.post_project, tiles.mix_pre, tiles.backward_dots, tiles.backward_apply):
            assert tokens % tile.tokens == 0, tile


def test_tiles_cover_every_width_and_refuse_others() -> None:
    """Oracle: the documented range; errors name what is accepted."""
    for architecture in ARCHITECTURES:
        for channels in (16, *WIDTH_BUCKETS, 2 * WIDTH_BUCKETS[-1] + 16):
            assert tiles_for(architecture, 4, channels).mix_pre.channels >= channels
    with pytest.raises(ValueError, match="'sm_70' has no tiles"):
        tiles_for("sm_70", 4, 1280)


def test_missing_gpu_is_an_error_with_a_remedy() -> None:
    """Oracle: the contract; `triton` is never replaced by another backend."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is present, so the backend is available")
    with pytest.raises(ValueError, match=r"`triton` cannot run here: torch sees no GPU.*use `cpu`"):
        make_backend("triton")
