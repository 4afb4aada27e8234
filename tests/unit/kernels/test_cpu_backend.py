"""The `cpu` backend against the fp64 reference, finite differences and itself."""

from __future__ import annotations

import pytest
import torch
from mhc_kernels import check
from mhc_kernels.seam import ConnectionSpec, Kept, make_backend

from tests.unit.kernels.seam_cases import (
    ALL_SPECS,
    Case,
    chain,
    check_gradients,
    gradients,
    kept_of,
    logits_of_thirty,
    make_inputs,
    relative_error,
    uncompiled_backend,
    widened,
)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@pytest.mark.parametrize(("num_tokens", "channels"), [(1, 64), (130, 64), (17, 192)])
def test_cpu_equals_the_fp64_reference(spec: ConnectionSpec, num_tokens: int, channels: int) -> None:
    """Oracle: the reference under fp64 autograd; outputs and every gradient within 1e-5 in norm."""
    inputs = make_inputs(Case(num_tokens, channels, spec), torch.float32)
    exact = widened(inputs)
    ours, ours_seams = chain(make_backend("cpu"), inputs)
    theirs, theirs_seams = chain(make_backend("reference"), exact)
    assert relative_error(ours, theirs) < 2e-6
    for a, b in zip(ours_seams, theirs_seams, strict=True):
        assert relative_error(a.post_TN, b.post_TN) < 2e-6
        if a.res_TNN is not None and b.res_TNN is not None:
            assert relative_error(a.res_TNN, b.res_TNN) < 2e-6
    check_gradients(make_backend("cpu"), inputs)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_cpu_gradients_in_fp64(spec: ConnectionSpec) -> None:
    """Oracle: finite differences in fp64 over a whole chain."""
    inputs = make_inputs(Case(3, 16, spec, seed=5), torch.float64)
    leaves = list(inputs.leaves().values())
    backend = make_backend("cpu")
    assert torch.autograd.gradcheck(lambda *_: chain(backend, inputs)[0], leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_cpu_at_logits_of_thirty(n: int, saturated: bool) -> None:
    """Oracle: the fp64 reference; nothing may be lost where sigmoids and Sinkhorn saturate."""
    inputs = make_inputs(Case(33, 64, ConnectionSpec(num_streams=n)), torch.float32)
    logits_of_thirty(inputs, saturated=saturated)
    check_gradients(make_backend("cpu"), inputs)


def test_cpu_survives_logits_of_hundreds() -> None:
    """Oracle: the fp64 reference; scales of 30 on normal logits."""
    inputs = make_inputs(Case(33, 64, ConnectionSpec(num_streams=4), logit_scale=30.0), torch.float32)
    check_gradients(make_backend("cpu"), inputs)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_cpu_on_zero_and_constant_streams(value: float) -> None:
    """Oracle: the fp64 reference; on constant streams the gradient through H_pre cancels to nothing."""
    spec = ConnectionSpec(num_streams=4, projection_norm_eps=1e-6, sublayer_norm_eps=1e-6)
    inputs = make_inputs(Case(5, 64, spec), torch.float32)
    with torch.no_grad():
        inputs.streams_TNC.fill_(value)
    check_gradients(make_backend("cpu"), inputs)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_cpu_bf16_is_as_close_as_the_reference_in_bf16(spec: ConnectionSpec) -> None:
    """Oracle: the reference in bf16 with fp32 coefficients; only the order of fp32 sums differs."""
    inputs = make_inputs(Case(40, 64, spec), torch.bfloat16)
    ours, theirs = chain(make_backend("cpu"), inputs)[0], chain(make_backend("reference"), inputs)[0]
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, theirs) < 4e-3
    theirs_grads = gradients(make_backend("reference"), inputs)
    for name, grad in gradients(make_backend("cpu"), inputs).items():
        assert grad.dtype == theirs_grads[name].dtype
        assert relative_error(grad, theirs_grads[name]) < 2e-2, name


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cpu_recompute_is_bit_equal(spec: ConnectionSpec, dtype: torch.dtype) -> None:
    """Oracle: the forward's own tensors, bit for bit, over several token blocks."""
    backend = make_backend("cpu")
    inputs = make_inputs(Case(300, 512, spec), dtype, sublayers=3)
    _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


def test_collapse_matches_the_reference() -> None:
    """Oracle: the reference under autograd in fp64."""
    streams_TNC = torch.randn(9, 4, 32, dtype=torch.float64, requires_grad=True)
    pre_TN = torch.rand(9, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for name in ("cpu", "reference"):
        out_TC = make_backend(name).collapse(streams_TNC, pre_TN)
        results.append((out_TC, *torch.autograd.grad(out_TC.square().sum(), (streams_TNC, pre_TN))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropped_and_resupplied_tensors_give_the_same_gradients() -> None:
    """Oracle: gradients without hooks; large saved tensors are dropped after the forward and come
    again from `recompute_block`, as in a pipeline."""
    backend = make_backend("cpu")
    spec = ConnectionSpec(num_streams=4)
    inputs = make_inputs(Case(30, 64, spec), torch.float32, sublayers=3)
    expected = gradients(backend, inputs)
    store: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        large = tensor.dim() == 3 and tensor.shape[-1] == 64
        return tensor.data_ptr(), None if large else tensor

    def unpack(packed: tuple[int, torch.Tensor | None]) -> torch.Tensor:
        address, tensor = packed
        return store[address] if tensor is None else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out_TNC, seams = chain(backend, inputs)
    for seam, again in zip(
        seams, backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams)), strict=True
    ):
        store[seam.streams_TNC.data_ptr()] = again.streams_TNC
    weight_TNC = torch.randn(out_TNC.shape, generator=torch.Generator().manual_seed(99))
    leaves = inputs.leaves()
    grads = torch.autograd.grad((out_TNC * weight_TNC).sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("name", ["cpu", "compiled formulas"])
def test_second_derivatives_are_refused(name: str) -> None:
    """Oracle: the contract. Without the refusal autograd would leave out the seam's share without a word, as
    long as the inputs are reached by another way too."""
    backend = uncompiled_backend() if name != "cpu" else make_backend("cpu")
    inputs = make_inputs(Case(3, 16, ConnectionSpec(num_streams=2)), torch.float32)
    pre_TN = torch.rand(3, 2)
    for output in (
        chain(backend, inputs)[0],
        backend.close(inputs.streams_TNC, inputs.ys[0], pre_TN, None),
        backend.collapse(inputs.streams_TNC, pre_TN),
    ):
        with pytest.raises(ValueError, match=r"create_graph=True: a seam has no second derivatives"):
            torch.autograd.grad(output.square().sum(), inputs.streams_TNC, create_graph=True)


def test_a_backward_can_be_repeated_and_needs_no_gradient_of_its_inputs() -> None:
    """Oracle: the gradients of the first time, bit for bit: saved tensors are read, not changed. And those of
    the same seams when some inputs are constants, and outputs are unused or used in other strides."""
    backend = make_backend("cpu")
    inputs = make_inputs(Case(7, 32, ConnectionSpec(num_streams=4)), torch.float32)
    connection, leaves = inputs.connections[0], list(inputs.leaves().values())[:1]
    seam = backend.open(inputs.streams_TNC, connection)
    twice = [torch.autograd.grad(seam.h_TC.T.sin().sum(), leaves, retain_graph=True) for _ in range(2)]
    assert torch.equal(twice[0][0], twice[1][0])
    detached = {name: getattr(connection, name).detach() for name in ("phi_MD", "gain_C")}
    constant = connection._replace(**detached)
    alone = backend.open(inputs.streams_TNC, constant)
    (grad,) = torch.autograd.grad(alone.h_TC.sin().sum(), leaves)
    assert torch.equal(grad, twice[0][0])


def test_h_is_not_saved() -> None:
    """Oracle: the tensors that pass through autograd's hooks. A backward needs neither h nor the collapsed
    streams, so h is kept only by a sublayer that wants it."""
    inputs = make_inputs(Case(6, 32, ConnectionSpec(num_streams=4)), torch.float32)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        seam = make_backend("cpu").open(inputs.streams_TNC, inputs.connections[0])
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert seam.streams_TNC.untyped_storage().data_ptr() in kept
    assert seam.h_TC.untyped_storage().data_ptr() not in kept


def test_non_finite_input_stays_visible() -> None:
    """Oracle: IEEE arithmetic; one NaN token poisons its own outputs and no other token's."""
    inputs = make_inputs(Case(20, 32, ConnectionSpec(num_streams=4)), torch.float32)
    with torch.no_grad():
        inputs.streams_TNC[7, 2, 5] = float("nan")
        out_TNC, _ = chain(make_backend("cpu"), inputs)
    assert out_TNC[7].isnan().all()
    assert out_TNC[torch.arange(20) != 7].isfinite().all()


BAD_STREAMS = {
    "shape": (torch.zeros(3, 64), r"streams_TNC has shape \(3, 64\)"),
    "n": (torch.zeros(3, 3, 64), "n=3 streams"),
    "channels": (torch.zeros(3, 4, 40), "C=40 channels: a multiple of 16"),
    "dtype": (torch.zeros(3, 4, 64, dtype=torch.float16), "float16"),
    "strides": (torch.zeros(4, 3, 64).transpose(0, 1), "contiguous streams are needed"),
    "device": (torch.zeros(3, 4, 64, device="meta"), "meta"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_streams_are_refused_by_name(name: str) -> None:
    """Oracle: the contract; the error names the argument and what is accepted."""
    streams_TNC, message = BAD_STREAMS[name]
    connection = make_inputs(Case(3, 64, ConnectionSpec(num_streams=4)), torch.float32).connections[0]
    with pytest.raises(ValueError, match=message):
        make_backend("cpu").open(streams_TNC, connection)


def test_bad_companions_are_refused_by_name() -> None:
    """Oracle: the contract, for everything that comes beside the streams."""
    inputs = make_inputs(Case(3, 64, ConnectionSpec(num_streams=4)), torch.float32)
    backend = make_backend("cpu")
    seam = backend.open(inputs.streams_TNC, inputs.connections[0])
    y_TC, connection = inputs.ys[0], inputs.connections[1]
    with pytest.raises(ValueError, match=r"y_TC has shape \(2, 64\)"):
        backend.cross(seam.streams_TNC, y_TC[:2], seam.post_TN, seam.res_TNN, connection)
    with pytest.raises(ValueError, match=r"post_TN has dtype torch\.bfloat16"):
        backend.cross(seam.streams_TNC, y_TC, seam.post_TN.bfloat16(), seam.res_TNN, connection)
    with pytest.raises(ValueError, match="res_TNN is None, but mixing=sinkhorn"):
        backend.cross(seam.streams_TNC, y_TC, seam.post_TN, None, connection)
    with pytest.raises(ValueError, match="phi_MD has shape"):
        backend.open(inputs.streams_TNC, connection._replace(phi_MD=connection.phi_MD[:, :32]))
    with pytest.raises(ValueError, match="shifted_pre is False"):
        backend.open(inputs.streams_TNC, connection, seam.pre_TN)
    with pytest.raises(ValueError, match="kept is empty"):
        backend.recompute_block(inputs.streams_TNC, [])
    kept = Kept(seam.pre_TN, seam.rstd_T, connection.gain_C, seam.post_TN, seam.res_TNN, y_TC)
    for changed, message in (
        ({"rstd_T": seam.rstd_T[:2]}, r"kept\[1\]\.rstd_T has shape \(2,\)"),
        ({"pre_TN": seam.pre_TN.bfloat16()}, r"kept\[1\]\.pre_TN has dtype torch\.bfloat16"),
        ({"post_TN": seam.post_TN.to("meta")}, r"kept\[1\]\.post_TN is on meta"),
        ({"y_TC": None}, r"kept\[1\]\.y_TC is None: only the last of the 3"),
        ({"res_TNN": None}, r"kept\[1\]\.res_TNN is None, kept\[0\]\.res_TNN is not"),
        ({"gain_C": torch.zeros(128)[::2]}, r"kept\[1\]\.gain_C has strides \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.recompute_block(seam.streams_TNC, [kept, kept._replace(**changed), kept])
    with pytest.raises(ValueError, match="backend 'gpu' is unknown"):
        make_backend("gpu")  # type: ignore[arg-type]
    assert check.CHANNEL_MULTIPLE == 16
