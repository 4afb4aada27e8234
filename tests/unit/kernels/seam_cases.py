"""Shared inputs of the kernel tests: connections and streams from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from mhc_kernels import reference, whole_tensor
from mhc_kernels.compiled_operations import CompiledOperations
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.seam import Connection, ConnectionSpec, Kept, Mixing, Seam, SeamBackend, make_backend
from torch import Tensor


@dataclass(frozen=True)
class Case:
    num_tokens: int
    channels: int
    spec: ConnectionSpec
    logit_scale: float = 1.0
    seed: int = 0


@dataclass
class Inputs:
    """Leaf tensors of a three-sublayer chain: open, cross, close."""

    streams_TNC: Tensor
    ys: list[Tensor]
    connections: list[Connection]

    def leaves(self) -> dict[str, Tensor]:
        named = {"streams": self.streams_TNC}
        named |= {f"y{index}": y for index, y in enumerate(self.ys)}
        for index, connection in enumerate(self.connections):
            for field in ("phi_MD", "alpha_3", "bias_M", "gain_C"):
                named[f"{field}{index}"] = getattr(connection, field)
        return named


def make_inputs(case: Case, dtype: torch.dtype, sublayers: int = 2) -> Inputs:
    """Values are drawn in fp32 and rounded to `dtype`, so that every precision starts from the same numbers
    when `dtype` is fp32 or fp64; parameters of bf16 inputs stay fp32."""
    generator = torch.Generator().manual_seed(case.seed)
    n, m = case.spec.num_streams, case.spec.num_coefficients
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int, scale: float = 1.0, into: torch.dtype = exact) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(into).requires_grad_()

    streams_TNC = draw(case.num_tokens, n, case.channels, into=dtype)
    ys = [draw(case.num_tokens, case.channels, into=dtype) for _ in range(sublayers)]
    connections = [
        Connection(
            draw(m, n * case.channels, scale=(n * case.channels) ** -0.5),
            draw(3, scale=case.logit_scale),
            draw(m, scale=case.logit_scale),
            draw(case.channels, scale=0.3),
            case.spec,
        )
        for _ in range(sublayers)
    ]
    return Inputs(streams_TNC, ys, connections)


def chain(backend: SeamBackend, inputs: Inputs) -> tuple[Tensor, list[Seam]]:
    """open, cross ..., close over all sublayers; y * h stands in for a sublayer function, so
    that gradients travel through h as in a model."""
    spec = inputs.connections[0].spec
    seam = backend.open(inputs.streams_TNC, inputs.connections[0])
    seams = [seam]
    for y_TC, connection in zip(inputs.ys[:-1], inputs.connections[1:], strict=True):
        carried = seam.pre_TN if spec.shifted_pre else None
        seam = backend.cross(
            seam.streams_TNC, y_TC * seam.h_TC, seam.post_TN, seam.res_TNN, connection, carried
        )
        seams.append(seam)
    out_TNC = backend.close(seam.streams_TNC, inputs.ys[-1] * seam.h_TC, seam.post_TN, seam.res_TNN)
    return out_TNC, seams


@dataclass
class Run:
    """Results of `chain`, and the gradients of a fixed random projection of its output by leaf."""

    out_TNC: Tensor
    seams: list[Seam]
    gradients: dict[str, Tensor]


def run(backend: SeamBackend, inputs: Inputs) -> Run:
    out_TNC, seams = chain(backend, inputs)
    generator = torch.Generator().manual_seed(99)
    weight_TNC = torch.randn(out_TNC.shape, generator=generator).to(out_TNC.dtype)
    leaves = inputs.leaves()
    grads = torch.autograd.grad((out_TNC * weight_TNC).sum(), list(leaves.values()), allow_unused=True)
    named = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return Run(out_TNC, seams, named)


def gradients(backend: SeamBackend, inputs: Inputs) -> dict[str, Tensor]:
    return run(backend, inputs).gradients


def kept_of(inputs: Inputs, seams: list[Seam]) -> list[Kept]:
    """What a recompute block keeps of the chain's sublayers."""
    kept = []
    carried_pre_TN = seams[0].pre_TN
    for y_TC, connection, seam in zip(inputs.ys, inputs.connections, seams, strict=True):
        used_pre_TN = carried_pre_TN if connection.spec.shifted_pre else seam.pre_TN
        carried_pre_TN = seam.pre_TN
        output_TC = (y_TC * seam.h_TC).detach()
        kept.append(Kept(used_pre_TN, seam.rstd_T, connection.gain_C, seam.post_TN, seam.res_TNN, output_TC))
    return kept


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""
    return _each_leaf(inputs, lambda leaf: leaf.detach().double().requires_grad_())


def on_device(inputs: Inputs, device: str) -> Inputs:
    return _each_leaf(inputs, lambda leaf: leaf.detach().to(device).requires_grad_())


def _each_leaf(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return Inputs(
        change(inputs.streams_TNC),
        [change(y) for y in inputs.ys],
        [c._replace(**{f: change(getattr(c, f)) for f in c._fields[:4]}) for c in inputs.connections],
    )


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """|value - oracle| / |oracle| in the 2-norm, in fp64."""
    value, oracle = value.detach().double(), oracle.detach().double()
    return ((value - oracle).norm() / oracle.norm().clamp(min=1e-300)).item()


def rounding_effect(inputs: Inputs, exact: dict[str, Tensor], draws: int = 4) -> dict[str, float]:
    """How far each gradient moves, in norm and in fp64, when every input moves by up to one unit in the last
    place of fp32 and the logits are rounded to fp32: no arithmetic with fp32 coefficients can be expected to
    do better. The largest of several draws."""
    generator = torch.Generator().manual_seed(7)
    exact_logits = reference.logits

    def nearly(tensor: Tensor, last_places: float) -> Tensor:
        units = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor * (1 + units * last_places * torch.finfo(torch.float32).eps)

    def rounded_logits(*arguments: Any) -> Tensor:
        return nearly(exact_logits(*arguments), 0.5)

    moved = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        nearby = widened(inputs)
        with torch.no_grad():
            for leaf in nearby.leaves().values():
                leaf.copy_(nearly(leaf, 1.0))
        with mock.patch.object(reference, "logits", rounded_logits):
            shifted = gradients(make_backend("reference"), nearby)
        for name, grad in shifted.items():
            moved[name] = max(moved[name], (grad - exact[name]).norm().item())
    return moved


def check_gradients(backend: SeamBackend, inputs: Inputs) -> tuple[Run, Run]:
    """Our run and the reference's in fp64. Every gradient is within 1e-5 of it in norm; where rounding inputs
    and logits alone moves a gradient further (sums that cancel), within twice that movement."""
    our_run, exact_run = run(backend, inputs), run(make_backend("reference"), widened(inputs))
    ours, exact = our_run.gradients, exact_run.gradients
    assert ours.keys() == exact.keys()
    errors = {name: (grad.double() - exact[name]).norm().item() for name, grad in ours.items()}
    missed = [name for name, error in errors.items() if not error <= 1e-5 * exact[name].norm().item()]
    if missed:
        moved = rounding_effect(inputs, exact)
        for name in missed:
            assert errors[name] <= 2 * moved[name], (name, errors[name], moved[name], exact[name].norm())
    return our_run, exact_run


def logits_of_thirty(inputs: Inputs, *, saturated: bool) -> None:
    """Set the biases so that logits spread up to +-30: all at the ends (saturated), or evenly between."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for connection in inputs.connections:
            spread = torch.rand(connection.bias_M.shape, generator=generator) * 2 - 1
            connection.bias_M.copy_((spread.sign() if saturated else spread) * 30.0)
            connection.alpha_3.fill_(0.01 if saturated else 1.0)


def uncompiled_backend(name: str = "uncompiled") -> FunctionBackend:
    """The compiled backend's own formulas without the compiler."""
    operations = CompiledOperations()
    for formula in ("update", "update_backward", "project", "collapse_and_norm"):
        setattr(operations, f"_{formula}", getattr(whole_tensor, formula))
    for formula in ("collapse_and_norm_backward", "total_gradient", "weighted_sum", "scale"):
        setattr(operations, f"_{formula}", getattr(whole_tensor, formula))
    return FunctionBackend(name, operations, lambda _: None)


ALL_SPECS = [
    ConnectionSpec(num_streams=4),
    ConnectionSpec(num_streams=4, sinkhorn_eps=1e-6, pre_eps=1e-6),
    ConnectionSpec(num_streams=2),
    ConnectionSpec(num_streams=8),
    ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY),
    ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS),
    ConnectionSpec(num_streams=2, mixing=Mixing.PERMUTATIONS),
    ConnectionSpec(num_streams=4, shifted_pre=True),
]
