"""Triton kernels, interpreted on NaN-filled results, against the fp64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from mhc_kernels import interpreted, launch
from mhc_kernels.seam import ConnectionSpec, Mixing, SeamBackend, make_backend
from mhc_kernels.tiles import Tile, TileSet, tiles_for

from tests.unit.kernels.seam_cases import (
    ALL_SPECS,
    Case,
    Inputs,
    chain,
    gradients,
    kept_of,
    make_inputs,
    relative_error,
    widened,
)


def nan_filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(tuple(shape), float("nan"), dtype=dtype, device=device)


def quick_tiles(architecture: str, num_streams: int, channels: int) -> TileSet:
    """The table's tiles with more tokens per row program: the interpreter pays per program."""
    tiles = tiles_for(architecture, num_streams, channels)
    return tiles._replace(
        mix_pre=Tile(16, tiles.mix_pre.channels, 4), backward_dots=Tile(16, tiles.backward_dots.channels, 4)
    )


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "new_result", nan_filled)
    monkeypatch.setattr(launch, "tiles_for", quick_tiles)
    with interpreted.rounded_like_a_device():
        yield


@pytest.fixture
def backend() -> SeamBackend:
    return make_backend("triton")


def check_fp32(backend: SeamBackend, inputs: Inputs) -> None:
    """Coefficients within 1e-6, outputs and every gradient within 1e-5 of the fp64 reference, in norm."""
    exact = widened(inputs)
    ours, ours_seams = chain(backend, inputs)
    theirs, theirs_seams = chain(make_backend("reference"), exact)
    for a, b in zip(ours_seams, theirs_seams, strict=True):
        assert relative_error(a.pre_TN, b.pre_TN) < 1e-6
        assert relative_error(a.post_TN, b.post_TN) < 1e-6
        if a.res_TNN is not None and b.res_TNN is not None:
            assert relative_error(a.res_TNN, b.res_TNN) < 1e-6
    assert relative_error(ours, theirs) < 2e-6
    ours_grads, theirs_grads = gradients(backend, inputs), gradients(make_backend("reference"), exact)
    assert ours_grads.keys() == theirs_grads.keys()
    for name in ours_grads:
        assert relative_error(ours_grads[name], theirs_grads[name]) < 1e-5, name


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_fp32_parity(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the reference under fp64 autograd."""
    check_fp32(backend, make_inputs(Case(17, 64, spec), torch.float32))


@pytest.mark.parametrize(("num_tokens", "channels"), [(1, 192), (64, 192)])
def test_fp32_parity_of_other_shapes(backend: SeamBackend, num_tokens: int, channels: int) -> None:
    """Oracle: the reference under fp64 autograd; one token, and C that is not a power of two."""
    check_fp32(backend, make_inputs(Case(num_tokens, channels, ConnectionSpec(num_streams=4)), torch.float32))


@pytest.mark.long
@pytest.mark.parametrize(
    ("n", "num_tokens", "channels"), list(itertools.product([2, 4, 8], [1, 17, 64, 130], [64, 192, 512]))
)
def test_fp32_parity_sweep(backend: SeamBackend, n: int, num_tokens: int, channels: int) -> None:
    """Oracle: the reference under fp64 autograd, over every shape the project promises."""
    check_fp32(backend, make_inputs(Case(num_tokens, channels, ConnectionSpec(num_streams=n)), torch.float32))


@pytest.mark.parametrize("n", [2, 4])
def test_extreme_logits(backend: SeamBackend, n: int) -> None:
    """Oracle: the fp64 reference at logits of +-30. Gradients are ill-conditioned there: a rounding of the
    logits alone moves them by 1e-5, so they are held to 1e-3."""
    spec = ConnectionSpec(num_streams=n)
    inputs = make_inputs(Case(17, 64, spec), torch.float32)
    generator = torch.Generator().manual_seed(4)
    for connection in inputs.connections:
        with torch.no_grad():
            signs = torch.randint(0, 2, connection.bias_M.shape, generator=generator) * 2.0 - 1.0
            connection.bias_M.copy_(signs * 30.0)
            connection.alpha_3.fill_(0.01)
    _, ours = chain(backend, inputs)
    _, theirs = chain(make_backend("reference"), widened(inputs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.res_TNN is not None
        assert b.res_TNN is not None
        assert relative_error(a.res_TNN, b.res_TNN) < 2e-6
    exact = gradients(make_backend("reference"), widened(inputs))
    for name, grad in gradients(backend, inputs).items():
        assert grad.isfinite().all(), name
        scale = max(exact[name].norm().item(), 1e-4)
        assert (grad.double() - exact[name]).norm().item() < 1e-3 * scale, name


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_zero_and_constant_streams(backend: SeamBackend, value: float) -> None:
    """Oracle: the fp64 reference; zero streams are where the RMS is only its eps. On constant streams the
    gradient through H_pre cancels to nothing (RMSNorm ignores scale), so 2e-5 instead of 1e-5."""
    spec = ConnectionSpec(num_streams=4, projection_norm_eps=1e-6, sublayer_norm_eps=1e-6)
    inputs = make_inputs(Case(5, 64, spec), torch.float32)
    with torch.no_grad():
        inputs.streams_TNC.fill_(value)
    ours, _ = chain(backend, inputs)
    theirs, _ = chain(make_backend("reference"), widened(inputs))
    assert ours.isfinite().all()
    assert (ours.double() - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max().item())
    exact = gradients(make_backend("reference"), widened(inputs))
    for name, grad in gradients(backend, inputs).items():
        error = (grad.double() - exact[name]).norm().item()
        assert error < 2e-5 * max(exact[name].norm().item(), 1e-2), name


@pytest.mark.parametrize("spec", [ALL_SPECS[0], ALL_SPECS[4], ALL_SPECS[7]], ids=str)
def test_bf16_is_within_one_ulp(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: one seam of the fp64 reference from the same bf16 inputs, rounded to bf16; one unit in the last
    place may differ. h is computed from the rounded x', so the oracle's is too."""
    inputs = make_inputs(Case(17, 64, spec), torch.bfloat16)
    exact = widened(inputs)
    carried = torch.rand(17, spec.num_streams) if spec.shifted_pre else None
    coefficients = [torch.rand(17, spec.num_streams), torch.rand(17, spec.num_streams, spec.num_streams)]
    res_TNN = None if spec.mixing is Mixing.IDENTITY else coefficients[1]
    ours = backend.cross(
        inputs.streams_TNC, inputs.ys[0], coefficients[0], res_TNN, inputs.connections[0], carried
    )
    reference = make_backend("reference")
    update = reference.close(
        exact.streams_TNC,
        exact.ys[0],
        coefficients[0].double(),
        None if res_TNN is None else res_TNN.double(),
    )
    wide_carried = None if carried is None else carried.double()
    theirs = reference.open(ours.streams_TNC.detach().double(), exact.connections[0], wide_carried)
    assert ulps(ours.streams_TNC, update) <= 1
    assert (ours.streams_TNC == update.bfloat16()).float().mean() > 0.99
    assert ulps(ours.h_TC, theirs.h_TC) <= 1
    assert relative_error(ours.post_TN, theirs.post_TN) < 1e-6


def ulps(value: torch.Tensor, oracle: torch.Tensor) -> int:
    """Largest distance in bf16 steps; both signs on one scale."""

    def position(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((position(value) - position(oracle)).abs().max())


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recompute_is_bit_equal(backend: SeamBackend, spec: ConnectionSpec, dtype: torch.dtype) -> None:
    """Oracle: the forward's own tensors, bit for bit."""
    inputs = make_inputs(Case(9, 64, spec), dtype, sublayers=3)
    with torch.no_grad():
        _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


@pytest.mark.parametrize("spec", [ALL_SPECS[0], ALL_SPECS[5]], ids=str)
def test_program_order_does_not_matter(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the kernels in their usual order, bit for bit."""
    inputs = make_inputs(Case(70, 192, spec), torch.float32, sublayers=1)
    ordered, expected = chain(backend, inputs)[0], gradients(backend, inputs)
    with interpreted.shuffled_programs(seed=7):
        assert torch.equal(chain(backend, inputs)[0], ordered)
        for name, grad in gradients(backend, inputs).items():
            assert torch.equal(grad, expected[name]), name


def test_a_changed_order_is_really_another_order() -> None:
    """Oracle: a kernel whose result depends on the order; the shuffle must change it."""
    orders = []
    builder = interpreted.interpreter.interpreter_builder
    with interpreted.shuffled_programs(seed=7):
        builder.set_grid_dim(5, 3, 1)
        for x, y in itertools.product(range(5), range(3)):
            builder.set_grid_idx(x, y, 0)
            orders.append(builder.grid_idx)
    assert sorted(orders) == sorted(itertools.product(range(5), range(3), range(1)))
    assert orders != sorted(orders)


def test_non_finite_values_propagate(backend: SeamBackend) -> None:
    """Oracle: IEEE arithmetic; one infinite token is non-finite afterwards and no other token is."""
    inputs = make_inputs(Case(20, 64, ConnectionSpec(num_streams=4)), torch.float32)
    with torch.no_grad():
        inputs.streams_TNC[7, 2, 5] = float("inf")
        out_TNC, _ = chain(backend, inputs)
    assert not out_TNC[7].isfinite().any()
    assert out_TNC[torch.arange(20) != 7].isfinite().all()


def test_collapse(backend: SeamBackend) -> None:
    """Oracle: the reference under autograd."""
    streams_TNC = torch.randn(9, 4, 48, requires_grad=True)
    pre_TN = torch.rand(9, 4, requires_grad=True)
    results = []
    for one in (backend, make_backend("reference")):
        out_TC = one.collapse(streams_TNC, pre_TN)
        results.append((out_TC, *torch.autograd.grad(out_TC.square().sum(), (streams_TNC, pre_TN))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_table_tiles(backend: SeamBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the fp64 reference, with the tiles of the table as they are."""
    monkeypatch.setattr(launch, "tiles_for", tiles_for)
    check_fp32(backend, make_inputs(Case(3, 64, ConnectionSpec(num_streams=4)), torch.float32))
