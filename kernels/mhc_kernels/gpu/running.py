"""How kernels run beside other work: streams, devices, a host that never waits, a compiler around them."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mhc_kernels.gpu.plan import NEEDS_GPU, Outcome, Plan
from mhc_kernels.gpu.problem import Problem, relative_error
from mhc_kernels.seam import make_backend

BUSY_CYCLES = 2_000_000_000
"""About a second of a GPU's clock."""


def side_stream(plan: Plan) -> Outcome:
    """Forward and backward on an urgent stream while the default one is busy: they end before it does, and
    compute what they compute alone. So launches go to the current stream, autograd's backward to that of the
    forward, and nothing in between waits for the default stream."""
    if not torch.cuda.is_available():
        return NEEDS_GPU
    backend, problem = (
        make_backend("triton"),
        Problem(plan.cases[0], plan.num_tokens, torch.bfloat16, plan.device),
    )
    busy, urgent = torch.cuda.default_stream(), torch.cuda.Stream(priority=-1)
    with torch.cuda.stream(urgent):  # compiles, and takes memory from the device, which may wait for it
        alone = problem.both_ways(backend)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    with torch.cuda.stream(urgent):
        beside = problem.both_ways(backend)
    urgent.synchronize()
    still_busy = not busy.query()
    torch.cuda.synchronize()
    wrong = [] if still_busy else ["work on the urgent stream waited for the default stream"]
    wrong += [f"{name} differs" for name, value in beside.items() if not torch.equal(value, alone[name])]
    return Outcome(not wrong, {}, "; ".join(wrong))


def host_never_waits(plan: Plan) -> Outcome:
    """torch told to raise when an operation makes the host wait for the device."""
    if not torch.cuda.is_available():
        return NEEDS_GPU
    backend, problem = (
        make_backend("triton"),
        Problem(plan.cases[0], plan.num_tokens, torch.bfloat16, plan.device),
    )
    problem.both_ways(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.both_ways(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Outcome(True, {})


def another_device(plan: Plan) -> Outcome:
    """Tensors on the second GPU while the first is selected."""
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return Outcome(None, {}, "needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        problem = Problem(plan.cases[0], plan.num_tokens, torch.bfloat16, device)
        results.append(problem.both_ways(make_backend("triton")))
    wrong = [
        name for name, value in results[0].items() if not torch.equal(value.cpu(), results[1][name].cpu())
    ]
    return Outcome(not wrong, {}, f"{', '.join(wrong)} differ" if wrong else "")


def compiled_around(plan: Plan) -> Outcome:
    """A function around a seam through torch.compile, in one graph, against the same without."""
    backend, problem = (
        make_backend("triton"),
        Problem(plan.cases[0], plan.num_tokens, torch.float32, plan.device),
    )

    def through(streams_TNC: Tensor, y_TC: Tensor) -> Tensor:
        seam = backend.cross(
            streams_TNC * 1.0,
            torch.nn.functional.silu(y_TC),
            problem.post_TN,
            problem.res_TNN,
            problem.connection,
        )
        return seam.h_TC.sin().sum() + seam.streams_TNC.square().sum()

    inputs = [problem.streams_TNC, problem.y_TC]
    plain = torch.autograd.grad(through(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(through, fullgraph=True)(*inputs), inputs)
    errors = [relative_error(a, b) for a, b in zip(compiled, plain, strict=True)]
    return Outcome(max(errors) <= 1e-5, {"errors": errors}, f"gradients are off by {max(errors):.1e}")


def host_microseconds(problem: Problem, rounds: int = 50) -> float:
    """What the host needs to enqueue a seam, forward and backward. Where that is longer than the kernels
    take, the device waits for the host."""
    backend = make_backend("triton")
    problem.both_ways(backend)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        problem.both_ways(backend)
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * seconds / rounds
