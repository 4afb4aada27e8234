"""Triton kernels, interpreted on NaN-filled results: recompute, order of programs, non-finite values."""

from __future__ import annotations

import itertools

import pytest
import torch
from mhc_kernels import interpreted
from mhc_kernels.seam import ConnectionSpec, SeamBackend

from tests.unit.kernels.seam_cases import ALL_SPECS, Case, chain, gradients, kept_of, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_recompute_is_bit_equal(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the forward's own tensors, bit for bit; with bf16 streams, where a wrong rounding would show."""
    inputs = make_inputs(Case(9, 64, spec), torch.bfloat16, sublayers=3)
    with torch.no_grad():
        _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


@pytest.mark.parametrize("spec", [ALL_SPECS[0], ALL_SPECS[5]], ids=str)
def test_program_order_does_not_matter(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the kernels in their usual order, bit for bit."""
    inputs = make_inputs(Case(40, 64, spec), torch.float32, sublayers=1)
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
