"""Triton kernels, interpreted on NaN-filled results: recompute, order of programs, non-finite values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from mhc_kernels import interpreted, tiles, triton_backend
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.seam import ConnectionSpec, Mixing, SeamBackend

from tests.unit.kernels.seam_cases import (
    ALL_SPECS,
    Case,
    chain,
    gradients,
    kept_of,
    make_inputs,
    relative_error,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned")

SHORT_EIGHT = ConnectionSpec(num_streams=8, sinkhorn_iterations=2)
SHORT_FOUR = ConnectionSpec(num_streams=4, sinkhorn_iterations=2)
PERMUTED = ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS)


@pytest.mark.parametrize(
    "spec",
    [
        *(SHORT_FOUR, SHORT_EIGHT, replace(SHORT_FOUR, num_streams=2), replace(SHORT_FOUR, shifted_pre=True)),
        ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY),
        pytest.param(PERMUTED, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_recompute_is_bit_equal(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the forward's own tensors, bit for bit; bf16 streams, where a wrong rounding would show."""
    inputs = make_inputs(Case(9, 64, spec), torch.bfloat16, sublayers=3)
    with torch.no_grad():
        _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


@pytest.mark.usefixtures("many_programs")
@pytest.mark.parametrize(
    "spec", [SHORT_FOUR, SHORT_EIGHT, pytest.param(PERMUTED, marks=pytest.mark.long)], ids=str
)
def test_program_order_does_not_matter(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the kernels in their usual order, bit for bit."""
    inputs = make_inputs(Case(17, 48, spec), torch.float32, sublayers=1)
    ordered = run(backend, inputs)
    with interpreted.shuffled_programs(seed=7):
        shuffled = run(backend, inputs)
    assert torch.equal(shuffled.out_TNC, ordered.out_TNC)
    for name, grad in shuffled.gradients.items():
        assert torch.equal(grad, ordered.gradients[name]), name


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_inside_the_arguments(backend: SeamBackend, value: float) -> None:
    """Oracle: the counter, which refuses accesses outside of a kernel's arguments, forward and backward; the
    gradient of phi, to which every token contributes, must not look finite, other tokens' gradients must."""
    inputs = make_inputs(Case(5, 64, ConnectionSpec(num_streams=2, sinkhorn_iterations=2)), torch.float32)
    with torch.no_grad():
        inputs.streams_TNC[3, 1, 5] = value
    with interpreted.counted_traffic():
        grads = gradients(backend, inputs)
    assert not grads["phi_MD0"].isfinite().all()
    assert not grads["streams"][3].isfinite().all()
    assert grads["streams"][:3].isfinite().all()


BAD_STREAMS = {
    "shape": (torch.zeros(3, 64), r"streams_TNC has shape \(3, 64\)"),
    "n": (torch.zeros(3, 3, 64), "n=3 streams: use one of"),
    "channels": (torch.zeros(3, 4, 40), "C=40 channels: a multiple of 16"),
    "half": (torch.zeros(3, 4, 64, dtype=torch.float16), "float16: one of"),
    "double": (torch.zeros(3, 4, 64, dtype=torch.float64), "float64, backend `triton` takes"),
    "strides": (torch.zeros(4, 3, 64).transpose(0, 1), "contiguous streams are needed"),
    "device": (torch.zeros(3, 4, 64, device="meta"), "is on meta, backend `triton` runs on"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_streams_are_refused_by_name(backend: SeamBackend, name: str) -> None:
    """Oracle: the contract; the error names the argument, what came and what is accepted."""
    streams_TNC, message = BAD_STREAMS[name]
    connection = make_inputs(Case(3, 64, ConnectionSpec(num_streams=4)), torch.float32).connections[0]
    with pytest.raises(ValueError, match=message):
        backend.open(streams_TNC, connection)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_chunked_launches_change_no_bit(
    backend: SeamBackend, spec: ConnectionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the launches on all tokens at once. dphi and the gain's gradient are summed in another order:
    within 1e-6 in norm; everything else is bit-equal."""
    monkeypatch.setattr(tiles, "chunk_tokens", lambda *_: 64)
    chunked = FunctionBackend("chunked", triton_backend.TritonOperations(chunked=True), lambda _: None)
    inputs = make_inputs(Case(130, 64, spec), torch.bfloat16, sublayers=1)
    whole, chunk = run(backend, inputs), run(chunked, inputs)
    assert torch.equal(whole.out_TNC, chunk.out_TNC)
    for one, other in zip(whole.seams, chunk.seams, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a is not None)
    for name, grad in chunk.gradients.items():
        if name.startswith(("phi", "gain")):
            assert relative_error(grad, whole.gradients[name]) < 1e-6, name
        else:
            assert torch.equal(grad, whole.gradients[name]), name


@pytest.mark.timeout(300)
def test_chunked_crossings_change_no_bit(backend: SeamBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the launches on all tokens at once, for a whole seam: there the first kernel of the backward
    mixes the streams again instead of reading them, and must round as the forward did."""
    monkeypatch.setattr(tiles, "chunk_tokens", lambda *_: 64)
    chunked = FunctionBackend("chunked", triton_backend.TritonOperations(chunked=True), lambda _: None)
    spec = ConnectionSpec(num_streams=2, sinkhorn_iterations=1)
    inputs = make_inputs(Case(66, 32, spec), torch.bfloat16, sublayers=2)
    expected, found = gradients(backend, inputs), gradients(chunked, inputs)
    for name, grad in found.items():
        same = torch.equal(grad, expected[name])
        assert same or (name.startswith(("phi", "gain")) and relative_error(grad, expected[name]) < 1e-6), (
            name
        )


def test_no_tokens(backend: SeamBackend) -> None:
    """Oracle: sums over nothing; every parameter's gradient is zero and nothing is launched on nothing."""
    inputs = make_inputs(Case(0, 64, ConnectionSpec(num_streams=4)), torch.float32)
    grads = gradients(backend, inputs)
    assert grads["streams"].shape == (0, 4, 64)
    assert all((grad == 0).all() for grad in grads.values())
