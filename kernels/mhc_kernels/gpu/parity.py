"""Every kernel against the fp64 reference on the device, and what must be equal bit for bit."""

from __future__ import annotations

import math

import torch

from mhc_kernels import tiles
from mhc_kernels.gpu.plan import Case, Outcome, Plan
from mhc_kernels.gpu.problem import Problem, chunked_backend, relative_error
from mhc_kernels.launch.architecture import device_architecture
from mhc_kernels.seam import ConnectionSpec, Kept, SeamBackend, make_backend

FP32_LIMIT = 1e-5
"""Largest relative error in norm of any output or gradient, where the streams are fp32."""
BF16_LIMITS = {"streams": 4e-3, "h": 6e-3, "post": 2e-3, "res": 2e-3}
BF16_GRADIENT_LIMIT = 1e-2
"""Of bf16 streams. They are rounded to 8 bits (2e-3); that matrix units read 11 bits of phi adds little. A
test puts both into the interpreter and finds errors of half these limits at most."""


def parity(case: Case, dtype: torch.dtype, plan: Plan) -> Outcome:
    return _parity(make_backend("triton"), case, dtype, plan.num_tokens, plan.device)


def parity_in_chunks(case: Case, dtype: torch.dtype, plan: Plan) -> Outcome:
    """Two chunks and a rest."""
    spec, channels = case
    architecture = device_architecture(torch.device(plan.device))
    chunk = tiles.chunk_tokens(architecture, spec.num_streams, channels, dtype.itemsize)
    return _parity(chunked_backend(), case, dtype, 2 * chunk + 2, plan.device)


def _parity(backend: SeamBackend, case: Case, dtype: torch.dtype, num_tokens: int, device: str) -> Outcome:
    """Where a sum cancels, an error may be twice the one that the reference makes in the same precision."""
    problem = Problem(case, num_tokens, dtype, device)
    ours, again = problem.both_ways(backend), problem.both_ways(backend)
    exact = problem.widened().both_ways(make_backend("reference"))
    plain = problem.both_ways(make_backend("reference"))
    errors = {name: relative_error(value, exact[name]) for name, value in ours.items()}
    unavoidable = {name: relative_error(value, exact[name]) for name, value in plain.items()}
    missed = [
        f"{name} is off by {error:.1e}, allowed is {limit(name, dtype):.1e} or twice the reference's "
        f"{unavoidable[name]:.1e}"
        for name, error in errors.items()
        if not error <= max(limit(name, dtype), 2 * unavoidable[name])
    ]
    missed += [
        f"{name} differs from run to run"
        for name, value in ours.items()
        if not torch.equal(value, again[name])
    ]
    missed += _recompute_differs(backend, problem)
    figures = {
        "case": case.name,
        "dtype": str(dtype),
        "num_tokens": num_tokens,
        "errors": errors,
        "errors_of_reference": unavoidable,
    }
    return Outcome(not missed, figures, "; ".join(missed))


def limit(name: str, dtype: torch.dtype) -> float:
    """Of the error of an output, or of a gradient (`d name`)."""
    return FP32_LIMIT if dtype == torch.float32 else BF16_LIMITS.get(name, BF16_GRADIENT_LIMIT)


def _recompute_differs(backend: SeamBackend, problem: Problem) -> list[str]:
    """A block of two sublayers, the seam's and one more, against the forward's own tensors."""
    seam = problem.forward(backend)
    pre_TN = seam.pre_TN if problem.carried_TN is None else problem.carried_TN
    kept = Kept(pre_TN, seam.rstd_T, problem.connection.gain_C, seam.post_TN, seam.res_TNN, problem.y_TC)
    first, second = backend.recompute_block(seam.streams_TNC.detach(), [kept, kept])
    closed_TNC = backend.close(seam.streams_TNC, problem.y_TC, seam.post_TN, seam.res_TNN)
    pairs = {"h": (first.h_TC, seam.h_TC), "streams": (second.streams_TNC, closed_TNC)}
    return [
        f"recomputed {name} differ from the forward's"
        for name, pair in pairs.items()
        if not torch.equal(*pair)
    ]


def not_finite(plan: Plan) -> Outcome:
    """One token that is NaN, one that is infinite: they stay what they are, and the others stay finite. A
    kernel that hangs is ended by the time limit of its process."""
    backend, case = make_backend("triton"), plan.cases[0]
    problem = Problem(case, plan.num_tokens, torch.float32, plan.device)
    bad = [3, plan.num_tokens - 1]
    with torch.no_grad():
        for token, value in zip(bad, (math.nan, math.inf), strict=True):
            problem.streams_TNC[token, 1, 5] = value
    results = problem.both_ways(backend)
    finite_T = {name: results[name].flatten(1).isfinite().all(1) for name in ("h", "d streams")}
    wrong = []
    for name, finite in finite_T.items():
        if finite[bad].any():
            wrong.append(f"{name} of a token that is not finite looks finite")
        finite[bad] = True
        if not finite.all():
            wrong.append(f"{name} of {int((~finite).sum())} tokens is not finite because others are not")
    return Outcome(not wrong, {"tokens": bad}, "; ".join(wrong))


def no_tokens(plan: Plan) -> Outcome:
    """Nothing in, nothing out, and gradients of parameters that are zero."""
    results = Problem(plan.cases[0], 0, torch.bfloat16, plan.device).both_ways(make_backend("triton"))
    wrong = [name for name, value in results.items() if value.ne(0).any()]
    return Outcome(not wrong, {}, ", ".join(wrong))


def misaligned(plan: Plan) -> Outcome:
    """Tensors that begin 4 bytes after a multiple of 16, as in the flat buffer of an optimizer: other code is
    compiled for them, which may add up in another order."""
    backend, case = make_backend("triton"), plan.cases[0]
    problem = Problem(case, plan.num_tokens, torch.float32, plan.device)
    aligned = problem.both_ways(backend)
    for name in ("streams_TNC", "y_TC"):
        setattr(problem, name, _moved(getattr(problem, name)))
    phi, alpha, bias, gain, _ = problem.connection
    problem.connection = problem.connection._replace(
        phi_MD=_moved(phi), alpha_3=_moved(alpha), bias_M=_moved(bias), gain_C=_moved(gain)
    )
    moved = problem.both_ways(backend)
    errors = {name: relative_error(value, aligned[name]) for name, value in moved.items()}
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= FP32_LIMIT]
    return Outcome(not wrong, {"case": case.name, "errors": errors}, "; ".join(wrong))


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    room = tensor.new_empty(tensor.numel() + 1)
    room[1:] = tensor.detach().flatten()
    return room[1:].view(tensor.shape).requires_grad_()


def far_offsets(plan: Plan) -> Outcome:
    """Streams of more than 2^31 elements: the last tokens get what they get alone."""
    num_tokens, n, channels = plan.far
    needed = 5.5 * num_tokens * n * channels * 2 + (4 << 30 if plan.device == "cuda" else 0)
    if plan.device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        free = torch.cuda.mem_get_info()[0]
        return Outcome(None, {}, f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")
    backend, case = make_backend("triton"), Case(ConnectionSpec(num_streams=n), channels)
    torch.manual_seed(1)
    small = Problem(case, 1, torch.bfloat16, plan.device)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=plan.device)

    x_TNC, y_TC = (draw(num_tokens, *s, dtype=torch.bfloat16) for s in ((n, channels), (channels,)))
    post_TN, res_TNN = (draw(num_tokens, *s, dtype=torch.float32) for s in ((n,), (n, n)))

    def results(rows: slice) -> list[torch.Tensor]:
        inputs = [t[rows].detach().requires_grad_() for t in (x_TNC, y_TC, post_TN, res_TNN)]
        x, y, post, res = inputs
        seam = backend.cross(x, y, post, res, small.connection)
        arriving = [x.detach(), y.detach()]
        gradients = torch.autograd.grad([seam.streams_TNC, seam.h_TC], inputs, arriving)
        made = (seam.streams_TNC, seam.h_TC, *gradients)
        return [t[-LAST_TOKENS:].clone() for t in made]

    whole, alone = results(slice(None)), results(slice(-LAST_TOKENS, None))
    names = ("streams", "h", "d streams", "d y", "d post", "d res")
    wrong = [name for name, a, b in zip(names, whole, alone, strict=True) if not torch.equal(a, b)]
    reason = f"the last tokens' {', '.join(wrong)} depend on the tokens before" if wrong else ""
    return Outcome(not wrong, {"elements": x_TNC.numel()}, reason)


LAST_TOKENS = 64
"""Whole tiles of every kernel, so that the same tokens share a tile in both runs."""
