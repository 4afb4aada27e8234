"""The kernels as operations of torch: what tracers are told of them, and a compiler that traces a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mhc_kernels import triton_backend
from mhc_kernels.seam import ConnectionSpec, Mixing, SeamBackend

from tests.unit.kernels.seam_cases import Case, chain, make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

SHORT = ConnectionSpec(num_streams=2, sinkhorn_iterations=2)
IDENTITY = ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY, shifted_pre=True)
QUICK_CHECKS = ("test_schema", "test_faketensor")


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def columns_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with the last two dimensions stored the other way around."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    ("spec", "checks"),
    [(IDENTITY, QUICK_CHECKS), pytest.param(SHORT, (*QUICK_CHECKS, "test_aot_dispatch_dynamic"))],
    ids=["identity", "sinkhorn"],
)
@pytest.mark.parametrize("laid_out", [columns_first, pytest.param(as_it_is, marks=pytest.mark.long)])
def test_fake_kernels_agree_with_the_real_ones(
    spec: ConnectionSpec, checks: tuple[str, ...], laid_out: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Oracle: the real operations; under fake tensors shapes, strides, dtypes and the schema must be the
    same, and the results when traced with unknown sizes, whatever the strides of what comes beside the
    streams."""
    inputs = make_inputs(Case(5, 32, spec), torch.bfloat16)
    n = spec.num_streams
    streams_TNC, y_TC = inputs.streams_TNC.detach(), laid_out(inputs.ys[0].detach())
    parameters = [parameter.detach() for parameter in inputs.connections[0][:4]]
    post_TN = laid_out(torch.rand(5, n))
    res_TNN = None if spec.mixing is Mixing.IDENTITY else laid_out(torch.rand(5, n, n))
    carried_TN = laid_out(torch.rand(5, n)) if spec.shifted_pre else None
    tail = (y_TC, post_TN, res_TNN)
    numbers = (spec.encoded, 0)
    forward_arguments = (streams_TNC, *tail, carried_TN, *parameters, *numbers)
    result = triton_backend.seam_forward(*forward_arguments)
    x_TNC, _, pre_TN, _, _, *rest = result
    backward_arguments = (
        *(streams_TNC, *tail, carried_TN, *parameters, [x_TNC, pre_TN, *rest]),
        *(streams_TNC, y_TC, carried_TN, post_TN, res_TNN),
        *numbers,
    )
    block = [[post_TN, post_TN], [torch.rand(5)] * 2, [parameters[3]] * 2, [post_TN]]
    block += [[] if res_TNN is None else [res_TNN], [y_TC]]
    for operation, arguments in (
        (triton_backend.seam_forward, forward_arguments),
        (triton_backend.seam_backward, backward_arguments),
        (triton_backend.recompute_block, (streams_TNC, *block)),
        (triton_backend.update_forward, (streams_TNC, *tail)),
        (triton_backend.update_backward, (streams_TNC, *tail, streams_TNC)),
        (triton_backend.collapse_forward, (streams_TNC, post_TN)),
        (triton_backend.collapse_backward, (streams_TNC, post_TN, y_TC)),
    ):
        torch.library.opcheck(operation, arguments, test_utils=checks)


@pytest.mark.parametrize("spec", [SHORT, pytest.param(IDENTITY, marks=pytest.mark.long)], ids=str)
def test_a_compiler_traces_through_a_whole_model(backend: SeamBackend, spec: ConnectionSpec) -> None:
    """Oracle: the same seams without a compiler, bit for bit. One graph, forward and backward: `fullgraph`
    makes anything that cannot be traced an error."""
    inputs = make_inputs(Case(5, 32, spec), torch.float32)
    leaves = list(inputs.leaves().values())

    def model(*_: torch.Tensor) -> torch.Tensor:
        return chain(backend, inputs)[0].square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(model(), leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_specifications_travel_as_text() -> None:
    """Oracle: the specification itself, which must come out as it went in."""
    for spec in (SHORT, IDENTITY, ConnectionSpec(num_streams=8, sinkhorn_eps=1e-6, pre_eps=0.1)):
        assert ConnectionSpec.decoded(spec.encoded) == spec
