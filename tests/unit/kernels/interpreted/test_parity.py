"""Triton kernels, interpreted on NaN-filled results, against the fp64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from mhc_kernels.launch import architecture
from mhc_kernels.seam import ConnectionSpec, Mixing, SeamBackend, make_backend
from mhc_kernels.tiles import tiles_for

from tests.unit.kernels.seam_cases import (
    ALL_SPECS,
    Case,
    Inputs,
    Run,
    check_gradients,
    logits_of_thirty,
    make_inputs,
    relative_error,
    widened,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def check_fp32(backend: SeamBackend, inputs: Inputs, out_limit: float = 2e-6) -> tuple[Run, Run]:
    """Coefficients within 1e-6 of the fp64 reference, gradients within 1e-5, in norm."""
    ours, theirs = check_gradients(backend, inputs)
    for a, b in zip(ours.seams, theirs.seams, strict=True):
        assert relative_error(a.pre_TN, b.pre_TN) < 1e-6
        assert relative_error(a.post_TN, b.post_TN) < 1e-6
        if a.res_TNN is not None and b.res_TNN is not None:
            assert relative_error(a.res_TNN, b.res_TNN) < 1e-6
    assert relative_error(ours.out_TNC, theirs.out_TNC) < out_limit
    return ours, theirs


@pytest.mark.parametrize(
    "spec", [*ALL_SPECS[:6], pytest.param(ALL_SPECS[6], marks=pytest.mark.long), ALL_SPECS[7]], ids=str
)
def test_fp32_parity(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the reference under fp64 autograd."""
    check_fp32(backend, make_inputs(Case(17, 64, spec), torch.float32))


@pytest.mark.parametrize(
    ("n", "num_tokens", "channels"),
    [(4, 1, 192), (4, 33, 48), pytest.param(2, 2, 8208, marks=pytest.mark.long)],
)
def test_fp32_parity_of_other_shapes(backend: SeamBackend, n: int, num_tokens: int, channels: int) -> None:
    """Oracle: the reference under fp64 autograd; one token, several tiles, C that is not a power of two, and
    wider than the widest bucket of tiles."""
    check_fp32(backend, make_inputs(Case(num_tokens, channels, ConnectionSpec(num_streams=n)), torch.float32))


SHAPES = list(itertools.product([2, 4, 8], [1, 17, 64, 130], [64, 192, 512]))
"""n, T, C: every combination that the project promises."""


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("logits", ["of one", "at thirty", "up to thirty"])
@pytest.mark.parametrize(("n", "num_tokens", "channels"), SHAPES)
def test_fp32_parity_sweep(backend: SeamBackend, n: int, num_tokens: int, channels: int, logits: str) -> None:
    """Oracle: the reference under fp64 autograd, over every promised shape, with logits of order one, all at
    +-30, and spread between."""
    inputs = make_inputs(Case(num_tokens, channels, ConnectionSpec(num_streams=n)), torch.float32)
    if logits != "of one":
        logits_of_thirty(inputs, saturated=logits == "at thirty")
    check_fp32(backend, inputs)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("n", "num_tokens", "channels"), SHAPES)
def test_zero_and_constant_streams_sweep(
    backend: SeamBackend, n: int, num_tokens: int, channels: int
) -> None:
    """Oracle: the reference under fp64 autograd, on tokens of zeros, threes and random numbers in turn."""
    for first in (0.0, 3.0) if num_tokens == 1 else (0.0,):
        inputs = flat_streams(n, num_tokens, channels)
        with torch.no_grad():
            inputs.streams_TNC[::3] = first
            inputs.streams_TNC[1::3] = 3.0
        check_fp32(backend, inputs)


def flat_streams(n: int, num_tokens: int, channels: int) -> Inputs:
    """The RMS of zero streams is only its eps."""
    spec = ConnectionSpec(num_streams=n, projection_norm_eps=1e-6, sublayer_norm_eps=1e-6)
    return make_inputs(Case(num_tokens, channels, spec), torch.float32)


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("n", [2, 4, pytest.param(8, marks=pytest.mark.long)])
def test_logits_of_thirty(backend: SeamBackend, n: int, saturated: bool) -> None:
    """Oracle: the fp64 reference at logits of up to +-30."""
    inputs = make_inputs(Case(17, 64, ConnectionSpec(num_streams=n)), torch.float32)
    logits_of_thirty(inputs, saturated=saturated)
    check_fp32(backend, inputs)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_zero_and_constant_streams(backend: SeamBackend, value: float) -> None:
    """Oracle: the fp64 reference; zero streams are where the RMS is only its eps. On constant streams the
    gradient through H_pre cancels to nothing, because RMSNorm ignores scale."""
    inputs = flat_streams(4, 5, 64)
    with torch.no_grad():
        inputs.streams_TNC.fill_(value)
    ours, _ = check_fp32(backend, inputs)
    assert ours.out_TNC.isfinite().all()


@pytest.mark.parametrize("spec", [ALL_SPECS[0], ALL_SPECS[4], ALL_SPECS[7]], ids=str)
def test_bf16_is_within_one_ulp(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: `check_bf16`."""
    check_bf16(backend, Case(17, 64, spec))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("n", "num_tokens", "channels"), SHAPES)
def test_bf16_sweep(backend: SeamBackend, n: int, num_tokens: int, channels: int) -> None:
    """Oracle: `check_bf16`, over every promised shape."""
    check_bf16(backend, Case(num_tokens, channels, ConnectionSpec(num_streams=n)))


def check_bf16(backend: SeamBackend, case: Case) -> None:
    """One seam of the fp64 reference from the same bf16 inputs, rounded to bf16; one unit in the last place
    may differ. h is computed from the rounded x', so the oracle's is too."""
    inputs, spec = make_inputs(case, torch.bfloat16), case.spec
    exact = widened(inputs)
    generator = torch.Generator().manual_seed(2)
    n = spec.num_streams
    post_TN, rest_TNN, carried_TN = (
        torch.rand(case.num_tokens, *shape, generator=generator) for shape in ((n,), (n, n), (n,))
    )
    carried = carried_TN if spec.shifted_pre else None
    res_TNN = None if spec.mixing is Mixing.IDENTITY else rest_TNN
    ours = backend.cross(inputs.streams_TNC, inputs.ys[0], post_TN, res_TNN, inputs.connections[0], carried)
    reference = make_backend("reference")
    wide_res = None if res_TNN is None else res_TNN.double()
    update = reference.close(exact.streams_TNC, exact.ys[0], post_TN.double(), wide_res)
    terms = reference.close(exact.streams_TNC.abs(), exact.ys[0].abs(), post_TN.double(), wide_res)
    wide_carried = None if carried is None else carried.double()
    theirs = reference.open(ours.streams_TNC.detach().double(), exact.connections[0], wide_carried)
    assert within_one_ulp(ours.streams_TNC, update, terms)
    assert (ours.streams_TNC == update.bfloat16()).float().mean() > 0.99
    used_pre_TN = (ours.pre_TN if carried is None else carried).double()
    scale_TC = ours.rstd_T.unsqueeze(1) * inputs.connections[0].gain_C.abs()
    terms_TC = (used_pre_TN.unsqueeze(2) * ours.streams_TNC.abs().double()).sum(1) * scale_TC
    assert within_one_ulp(ours.h_TC, theirs.h_TC, terms_TC)
    assert relative_error(ours.post_TN, theirs.post_TN) < 1e-6


def within_one_ulp(value: torch.Tensor, oracle: torch.Tensor, terms: torch.Tensor) -> bool:
    """At most one bf16 step apart; where terms cancel, at most the rounding of the fp32 sum apart."""

    def position(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    steps = (position(value) - position(oracle)).abs()
    cancelled = (value.double() - oracle).abs() <= 1e-6 * terms
    return bool(((steps <= 1) | cancelled).all())


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
    """Oracle: the fp64 reference, with the tiles of the table as they are: several programs along every axis
    but that of the rows, where a program is one token or two."""
    monkeypatch.setattr(architecture, "tiles_for", tiles_for)
    check_fp32(backend, make_inputs(Case(3, 80, ConnectionSpec(num_streams=4)), torch.float32))
