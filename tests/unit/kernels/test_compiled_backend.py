"""The `compiled` backend: its formulas uncompiled always, compiled in the long run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mhc_kernels import compiled_operations, tokens
from mhc_kernels.cpu_operations import CpuOperations
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.seam import ConnectionSpec, make_backend
from mhc_kernels.warm_up import may_take_seconds, warm_up, warm_up_tokens

from tests.unit.kernels.seam_cases import (
    ALL_SPECS,
    Case,
    chain,
    gradients,
    kept_of,
    make_inputs,
    relative_error,
    uncompiled_backend,
    widened,
)


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_formulas_equal_the_fp64_reference(spec: ConnectionSpec) -> None:
    """Oracle: the reference under fp64 autograd, every gradient within 1e-5 in norm."""
    inputs = make_inputs(Case(17, 64, spec), torch.float32)
    theirs = gradients(make_backend("reference"), widened(inputs))
    for name, grad in gradients(uncompiled_backend(), inputs).items():
        assert relative_error(grad, theirs[name]) < 1e-5, name


@pytest.mark.parametrize("spec", ALL_SPECS[:1] + ALL_SPECS[4:5] + ALL_SPECS[-1:], ids=str)
def test_formulas_in_fp64_pass_finite_differences(spec: ConnectionSpec) -> None:
    """Oracle: finite differences in fp64."""
    inputs = make_inputs(Case(3, 16, spec, seed=5), torch.float64)
    leaves = list(inputs.leaves().values())
    backend = uncompiled_backend()
    assert torch.autograd.gradcheck(lambda *_: chain(backend, inputs)[0], leaves, fast_mode=True, atol=1e-6)


def test_collapse_of_the_formulas() -> None:
    """Oracle: the reference under autograd."""
    streams_TNC = torch.randn(9, 4, 32, dtype=torch.float64, requires_grad=True)
    pre_TN = torch.rand(9, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in (uncompiled_backend(), make_backend("reference")):
        out_TC = backend.collapse(streams_TNC, pre_TN)
        results.append((out_TC, *torch.autograd.grad(out_TC.square().sum(), (streams_TNC, pre_TN))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_missing_compiler_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the contract; an unavailable backend is never replaced by another."""
    monkeypatch.setattr(compiled_operations.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"`compiled` cannot run here.*install one or use `cpu`"):
        make_backend("compiled")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_compiled_equals_the_fp64_reference_and_recomputes_bit_equal() -> None:
    """Oracle: the reference under fp64 autograd; for the recompute the forward's own tensors, bit for bit."""
    backend = make_backend("compiled")
    inputs = make_inputs(Case(40, 64, ConnectionSpec(num_streams=4)), torch.float32, sublayers=3)
    theirs = gradients(make_backend("reference"), widened(inputs))
    for name, grad in gradients(backend, inputs).items():
        assert relative_error(grad, theirs[name]) < 1e-5, name
    _, seams = chain(backend, inputs)
    again = backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))
    for seam, regenerated in zip(seams, again, strict=True):
        assert torch.equal(seam.streams_TNC, regenerated.streams_TNC)
        assert torch.equal(seam.h_TC, regenerated.h_TC)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_after_warming_up_nothing_compiles() -> None:
    """Oracle: torch, told to raise when it has to compile: training, evaluation and recompute at the shapes
    that were announced, with parameters as a model has them."""
    backend = make_backend("compiled")
    spec = ConnectionSpec(num_streams=4)
    inputs = make_inputs(Case(24, 64, spec), torch.bfloat16, sublayers=3)
    for index, connection in enumerate(inputs.connections):
        owned = {name: torch.nn.Parameter(getattr(connection, name)) for name in connection._fields[:4]}
        inputs.connections[index] = connection._replace(**owned)
    warm_up(backend, inputs.connections, 24, 64, torch.bfloat16, torch.device("cpu"))
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(backend, inputs)
        with torch.no_grad():
            _, seams = chain(backend, inputs)
        backend.recompute_block(inputs.streams_TNC.detach(), kept_of(inputs, seams))


@pytest.mark.parametrize("shifted_pre", [False, True])
def test_warming_up_uses_every_operation(shifted_pre: bool) -> None:
    """Oracle: the list of operations of a seam; the plain backend's are counted while it warms up."""
    used: set[str] = set()

    class Counting(CpuOperations):
        def __getattribute__(self, name: str) -> Any:
            used.add(name)
            return super().__getattribute__(name)

    backend = FunctionBackend("counting", Counting(), lambda _: None)
    spec = ConnectionSpec(num_streams=4, shifted_pre=shifted_pre)
    inputs = make_inputs(Case(5, 32, spec), torch.float32, sublayers=2)
    warm_up(backend, inputs.connections, 5, 32, torch.float32, torch.device("cpu"))
    assert used >= {name for name in dir(CpuOperations) if not name.startswith("_")}
    assert may_take_seconds(backend) == 0.0
    assert may_take_seconds(uncompiled_backend("compiled")) > 60.0


def test_warming_up_moves_rows_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the functions that launch kernels on a GPU, which are called here as there; each with the
    widths that were announced."""
    used: list[tuple[str, torch.Size]] = []

    def watched(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(first: torch.Tensor, *others: Any) -> torch.Tensor:
            used.append((name, first.shape))
            result = function(first, *others)
            assert result.requires_grad
            return result

        return call

    for name in ("permute", "unpermute", "swiglu"):
        monkeypatch.setattr(tokens, name, watched(name, getattr(tokens, name)))
    warm_up_tokens(6, 32, 2, (16, 48), torch.bfloat16, torch.device("cpu"))
    shapes = [("permute", (6, 32)), ("unpermute", (12, 32)), ("swiglu", (6, 32)), ("swiglu", (6, 96))]
    assert used == [(name, torch.Size(shape)) for name, shape in shapes]
