"""Mixings without iterations: oracles are the Kronecker product of numpy, Birkhoff's theorem, autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mhc_kernels import reference, token_last
from mhc_kernels.launch.mixings import mixing_code
from mhc_kernels.seam import ConnectionSpec, Mixing, make_backend

from tests.unit.kernels.seam_cases import Case, chain, gradients, kept_of, make_inputs, relative_error

SPECS = [
    ConnectionSpec(num_streams=2, mixing=Mixing.KRONECKER),
    ConnectionSpec(num_streams=4, mixing=Mixing.KRONECKER),
    ConnectionSpec(num_streams=8, mixing=Mixing.KRONECKER),
    ConnectionSpec(num_streams=8, mixing=Mixing.KRONECKER, shifted_pre=True),
    ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS),
    ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS, shifted_pre=True),
    ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY, shifted_pre=True),
]
IDS = [f"{spec.mixing}-{spec.num_streams}{'-shifted' * spec.shifted_pre}" for spec in SPECS]


def test_kronecker_is_numpys_kronecker_product() -> None:
    """Oracle: np.kron of the 2x2 factors, in order."""
    logits_TK = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    res_TNN = reference.kronecker_product(logits_TK)
    for logits_K, res_NN in zip(logits_TK, res_TNN, strict=True):
        product = np.ones((1, 1))
        for logit in logits_K.tolist():
            stay = 1 / (1 + np.exp(-logit))
            product = np.kron(product, [[stay, 1 - stay], [1 - stay, stay]])
        np.testing.assert_allclose(res_NN.numpy(), product, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("spec", SPECS[:3] + SPECS[4:5], ids=IDS[:3] + IDS[4:5])
def test_doubly_stochastic_to_the_last_bits(spec: ConnectionSpec, scale: float, dtype: torch.dtype) -> None:
    """Oracle: row and column sums of 1, no entry below 0, whatever the logits; a product stays one."""
    generator = torch.Generator().manual_seed(1)
    mix_TM = torch.randn(64, spec.num_coefficients, generator=generator).to(dtype) * scale
    alpha_3, bias_M = torch.ones(3, dtype=dtype), torch.zeros(spec.num_coefficients, dtype=dtype)
    for maker in (reference.coefficients, token_last.coefficients):
        res_TNN = maker(mix_TM, alpha_3, bias_M, spec).res_TNN
        assert res_TNN is not None
        assert (res_TNN >= 0).all()
        product_NN = torch.linalg.multi_dot(list(res_TNN))
        for matrices in (res_TNN, product_NN[None]):
            for dim in (1, 2):
                worst = (matrices.sum(dim) - 1).abs().max().item()
                allowed = 8 if matrices is res_TNN else 8 * len(res_TNN)
                assert worst <= allowed * torch.finfo(dtype).eps


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_kronecker_reaches_every_stream(num_streams: int) -> None:
    """Oracle: logits of +-infinity are exchanges of streams i -> i ^ p, one for each p."""
    bits = num_streams.bit_length() - 1
    corners = torch.tensor(list(itertools.product([1000.0, -1000.0], repeat=bits)))
    res_TNN = reference.kronecker_product(corners)
    index = torch.arange(num_streams)
    for p, res_NN in enumerate(res_TNN):
        assert torch.equal(res_NN.argmax(1), index ^ p)
        assert torch.equal(res_NN.sort(1).values[:, -1], torch.ones(num_streams))


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_hand_written_backward(spec: ConnectionSpec) -> None:
    """Oracle: autograd through the reference, in fp64 and fp32, and forward of a three-sublayer chain."""
    ours, oracle = make_backend("cpu"), make_backend("reference")
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = make_inputs(Case(7, 48, spec), dtype, sublayers=3)
        assert relative_error(chain(ours, inputs)[0], chain(oracle, inputs)[0]) < limit
        expected = gradients(oracle, inputs)
        for name, gradient in gradients(ours, inputs).items():
            assert relative_error(gradient, expected[name]) < limit, name


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_recompute_block_repeats_the_forward(spec: ConnectionSpec) -> None:
    """Oracle: the forward's own streams and inputs, bit for bit."""
    backend = make_backend("cpu")
    inputs = make_inputs(Case(9, 32, spec), torch.float32, sublayers=3)
    with torch.no_grad():
        _, seams = chain(backend, inputs)
    for seam, again in zip(
        seams, backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams)), strict=True
    ):
        assert torch.equal(again.streams_TNC, seam.streams_TNC)
        assert torch.equal(again.h_TC, seam.h_TC)


def test_what_has_no_gpu_kernel_says_so() -> None:
    """Oracle: the mixing and the ones there are, in the message."""
    with pytest.raises(ValueError, match=r"mixing=kronecker has no Triton kernels: use one of sinkhorn"):
        mixing_code(SPECS[0])
