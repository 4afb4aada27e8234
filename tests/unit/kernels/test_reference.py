"""The plain-torch reference against independent oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mhc_kernels import reference, token_last
from mhc_kernels.seam import ConnectionSpec, Mixing, make_backend

from tests.unit.kernels.seam_cases import ALL_SPECS, Case, chain, kept_of, make_inputs


def transposed_sinkhorn_with_eps(comb_TII: torch.Tensor, repeat: int, eps: float) -> torch.Tensor:
    """DeepSeek's convention, written out with loops over entries: comb[in][out], softmax over `out` plus eps,
    then sums over `in`, afterwards alternating; every division adds eps to the sum."""
    out = torch.empty_like(comb_TII)
    for t in range(comb_TII.shape[0]):
        n = comb_TII.shape[1]
        m = [[math.exp(comb_TII[t, i, o].item()) for o in range(n)] for i in range(n)]
        m = [[m[i][o] / sum(m[i]) + eps for o in range(n)] for i in range(n)]
        for step in range(2 * repeat - 1):
            if step % 2 == 0:
                sums = [sum(m[i][o] for i in range(n)) + eps for o in range(n)]
                m = [[m[i][o] / sums[o] for o in range(n)] for i in range(n)]
            else:
                sums = [sum(m[i]) + eps for i in range(n)]
                m = [[m[i][o] / sums[i] for o in range(n)] for i in range(n)]
        out[t] = torch.tensor(m, dtype=comb_TII.dtype)
    return out


@pytest.mark.parametrize("std", [1.0, 6.0])
def test_sinkhorn_with_eps_is_the_transposed_convention(std: float) -> None:
    """Oracle: scalar loops in the released code's transposed order (comb[in][out], eps 1e-6)."""
    logits_TNN = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * std
    ours = reference.sinkhorn(logits_TNN, iterations=20, eps=1e-6)
    theirs = transposed_sinkhorn_with_eps(logits_TNN.transpose(1, 2).contiguous(), 20, 1e-6)
    torch.testing.assert_close(ours.transpose(1, 2), theirs, rtol=1e-10, atol=1e-13)


def test_whole_seam_in_the_released_convention() -> None:
    """Oracle: scalar loops over one token in the released code's order: comb[in][out], eps 1e-6 on H_pre and
    in Sinkhorn, H_post twice a sigmoid, the projection divided by the RMS over all streams."""
    spec = ConnectionSpec(num_streams=4, sinkhorn_eps=1e-6, pre_eps=1e-6, projection_norm_eps=1e-6)
    inputs = make_inputs(Case(1, 16, spec), torch.float64, sublayers=1)
    backend, connection = make_backend("reference"), inputs.connections[0]
    seam = backend.open(inputs.streams_TNC, connection)
    out_TNC = backend.close(inputs.streams_TNC, inputs.ys[0], seam.post_TN, seam.res_TNN)
    x, y = inputs.streams_TNC[0].tolist(), inputs.ys[0][0].tolist()
    flat = [value for stream in x for value in stream]
    rms = math.sqrt(sum(value * value for value in flat) / len(flat) + 1e-6)
    projected = [
        sum(p * v for p, v in zip(row, flat, strict=True)) / rms for row in connection.phi_MD.tolist()
    ]
    scales = [
        a for a, count in zip(connection.alpha_3.tolist(), (4, 4, 16), strict=True) for _ in range(count)
    ]
    logits = [s * p + b for s, p, b in zip(scales, projected, connection.bias_M.tolist(), strict=True)]
    pre = [1 / (1 + math.exp(-value)) + 1e-6 for value in logits[:4]]
    post = [2 / (1 + math.exp(-value)) for value in logits[4:8]]
    by_out = torch.tensor(logits[8:], dtype=torch.float64).view(1, 4, 4)
    comb = transposed_sinkhorn_with_eps(by_out.transpose(1, 2), 20, 1e-6)[0].tolist()
    for c in range(16):
        for o in range(4):
            mixed = sum(comb[i][o] * x[i][c] for i in range(4)) + post[o] * y[c]
            assert out_TNC[0, o, c].item() == pytest.approx(mixed, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(seam.pre_TN[0], torch.tensor(pre, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(n=st.sampled_from([2, 4, 8]), scale=st.floats(0.0, 1e4), seed=st.integers(0, 2**31 - 1))
def test_fp32_sinkhorn_is_as_doubly_stochastic_as_exact_arithmetic(n: int, scale: float, seed: int) -> None:
    """Oracle: the definition, for logits of any size. In fp32 rows sum to 1, entries are in [0, 1], and the
    columns miss 1 by no more than 20 exact iterations miss it; for logits within +-1 by next to nothing."""
    spec = ConnectionSpec(num_streams=n)
    spread = torch.rand(5, n * n, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    mix_TM = torch.cat([torch.zeros(5, 2 * n), spread], dim=1)
    alpha_3, bias_M = torch.tensor([1.0, 1.0, scale]), torch.zeros(2 * n + n * n)
    exact = reference.coefficients(mix_TM.double(), alpha_3.double(), bias_M.double(), spec).res_TNN
    assert exact is not None
    missed = (exact.sum(-2) - 1).abs()
    for module in (reference, token_last):
        res_TNN = module.coefficients(mix_TM, alpha_3, bias_M, spec).res_TNN
        assert res_TNN is not None
        assert res_TNN.dtype == torch.float32
        assert (res_TNN.sum(-1) - 1).abs().max() < 1e-6
        assert res_TNN.min() >= 0.0
        assert res_TNN.max() <= 1.0 + 1e-6
        columns = (res_TNN.double().sum(-2) - 1).abs()
        assert (columns <= missed + 1e-4).all()
        if scale <= 1.0:
            assert columns.max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([2, 4, 8]),
    scale=st.floats(0.0, 30.0),
    seed=st.integers(0, 2**31 - 1),
    iterations=st.integers(1, 25),
)
def test_sinkhorn_rows_are_exact_and_columns_improve(
    n: int, scale: float, seed: int, iterations: int
) -> None:
    """Oracle: the definition. Rows sum to 1 after any number of iterations, entries are in [0, 1], and the
    largest column deviation never grows from one iteration to the next."""
    logits_TNN = (torch.rand(3, n, n, generator=torch.Generator().manual_seed(seed)) * 2 - 1).double() * scale
    res_TNN = reference.sinkhorn(logits_TNN, iterations, 0.0)
    more_TNN = reference.sinkhorn(logits_TNN, iterations + 1, 0.0)
    assert (res_TNN.sum(-1) - 1).abs().max() < 1e-12
    assert res_TNN.min() >= 0
    assert res_TNN.max() <= 1 + 1e-12
    deviation = (res_TNN.sum(-2) - 1).abs().sum(-1)
    assert ((more_TNN.sum(-2) - 1).abs().sum(-1) <= deviation + 1e-12).all()


@settings(max_examples=40, deadline=None)
@given(n=st.sampled_from([2, 4]), scale=st.floats(0.0, 30.0), seed=st.integers(0, 2**31 - 1))
def test_permutation_mixture_is_doubly_stochastic(n: int, scale: float, seed: int) -> None:
    """Oracle: Birkhoff; a convex combination of permutation matrices has unit row and column sums."""
    logits_TP = (
        torch.randn(3, math.factorial(n), generator=torch.Generator().manual_seed(seed)).double() * scale
    )
    res_TNN = reference.permutation_mixture(logits_TP, n)
    assert res_TNN.min() >= 0
    assert (res_TNN.sum(-1) - 1).abs().max() < 1e-12
    assert (res_TNN.sum(-2) - 1).abs().max() < 1e-12


def test_extreme_logits_stay_finite() -> None:
    """Oracle: the row sums; 400 between logits underflows exp in fp32, and rows must still sum to 1."""
    logits_TNN = torch.zeros(1, 4, 4)
    logits_TNN[0, 2, :] = -400.0
    res_TNN = reference.sinkhorn(logits_TNN, 20, 0.0)
    torch.testing.assert_close(res_TNN.sum(-1), torch.ones(1, 4))


def test_projection_divides_by_the_rms_over_all_streams() -> None:
    """Oracle: scaling the streams by 7 must not change the projection; a constant stream gives sum(phi)."""
    phi_MD = torch.randn(24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    streams_TNC = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = reference.normalised_projection(streams_TNC, phi_MD, 0.0)
    torch.testing.assert_close(reference.normalised_projection(7 * streams_TNC, phi_MD, 0.0), one)
    constant = reference.normalised_projection(torch.full((1, 4, 16), 5.0, dtype=torch.float64), phi_MD, 0.0)
    torch.testing.assert_close(constant[0], phi_MD.sum(1))


def test_zero_phi_gives_the_coefficients_of_the_bias() -> None:
    """Oracle: closed form; with phi = 0 and bias = 0, H_pre = 1/2, H_post = 1, H_res = 1/n."""
    spec = ConnectionSpec(num_streams=4)
    ours = reference.coefficients(torch.zeros(2, 24), torch.ones(3), torch.zeros(24), spec)
    torch.testing.assert_close(ours.pre_TN, torch.full((2, 4), 0.5))
    torch.testing.assert_close(ours.post_TN, torch.ones(2, 4))
    assert ours.res_TNN is not None
    torch.testing.assert_close(ours.res_TNN, torch.full((2, 4, 4), 0.25))


def test_update_uses_out_in_order() -> None:
    """Oracle: a permutation matrix written by hand; result 0 is input 1 plus y."""
    streams_TNC = torch.arange(2 * 16, dtype=torch.float32).reshape(1, 2, 16)
    res_TNN = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    y_TC = torch.full((1, 16), 100.0)
    out_TNC = reference.update(streams_TNC, y_TC, torch.tensor([[1.0, 0.0]]), res_TNN)
    torch.testing.assert_close(out_TNC[0, 0], streams_TNC[0, 1] + 100)
    torch.testing.assert_close(out_TNC[0, 1], streams_TNC[0, 0])


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_reference_gradients(spec: ConnectionSpec) -> None:
    """Oracle: finite differences in fp64 over the whole chain."""
    inputs = make_inputs(Case(2, 16, spec, seed=3), torch.float64)
    backend = make_backend("reference")
    leaves = list(inputs.leaves().values())
    assert torch.autograd.gradcheck(lambda *_: chain(backend, inputs)[0], leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_recompute_is_bit_equal(spec: ConnectionSpec, dtype: torch.dtype) -> None:
    """Oracle: the forward's own tensors, bit for bit."""
    backend = make_backend("reference")
    inputs = make_inputs(Case(17, 64, spec), dtype, sublayers=3)
    _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


def test_mixing_decides_the_number_of_coefficients() -> None:
    """Oracle: the counts 2n + n^2, 2n and 2n + n!."""
    assert ConnectionSpec(num_streams=4).num_coefficients == 24
    assert ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY).num_coefficients == 8
    assert ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS).num_coefficients == 32
