"""Times on a device: seams by backend, recompute, token work; and what the host needs for a seam."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mhc_kernels import formula, tokens
from mhc_kernels.gpu.plan import Case, Outcome, Plan
from mhc_kernels.gpu.problem import Problem, chunked_backend
from mhc_kernels.gpu.running import host_microseconds
from mhc_kernels.launch.architecture import device_architecture
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.seam import ConnectionSpec, Kept, make_backend
from mhc_kernels.tiles import tiles_for


def milliseconds(action: Callable[[], object]) -> float:
    """Of an action on the device, the cache flushed before each time; in a rehearsal, of doing it once."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        action()
        return 1e3 * (time.perf_counter() - begin)
    from triton.testing import do_bench  # type: ignore[import-untyped]

    return float(do_bench(action))


def seam_times(channels: int, plan: Plan) -> Outcome:
    """Milliseconds of one bf16 seam, n = 4, and the bandwidth that its bytes (formula.py) come to."""
    case = Case(ConnectionSpec(num_streams=4), channels)
    problem = Problem(case, plan.timed_tokens, torch.bfloat16, plan.device)
    row: dict[str, Any] = {"channels": channels, "num_tokens": plan.timed_tokens}
    backends = {
        "triton": make_backend("triton"),
        "chunked": chunked_backend(),
        "reference": make_backend("reference"),
    }
    for name, backend in backends.items():
        with torch.no_grad():
            row[f"{name}_forward_ms"] = milliseconds(partial(problem.forward, backend))
        row[f"{name}_both_ms"] = milliseconds(partial(problem.both_ways, backend))
    with torch.no_grad():
        seam = problem.forward(backends["triton"])
    kept = Kept(
        seam.pre_TN,
        seam.rstd_T,
        problem.connection.gain_C.detach(),
        seam.post_TN,
        seam.res_TNN,
        problem.y_TC.detach(),
    )
    for length in (2, 3):
        block = partial(backends["triton"].recompute_block, seam.streams_TNC, [kept] * length)
        row[f"recompute_{length}_ms"] = milliseconds(block)
    for name, moved in _bytes(case, plan).items():
        row[f"{name}_gigabytes_per_second"] = moved / row[f"triton_{name}_ms"] / 1e6
    if plan.device == "cuda":
        row["host_us"] = host_microseconds(problem)
    return Outcome(True, row)


def _bytes(case: Case, plan: Plan) -> dict[str, float]:
    """What the kernels move, forward and both ways."""
    spec, channels = case
    tiles = tiles_for(device_architecture(torch.device(plan.device)), spec.num_streams, channels)
    splits = parameter_splits(plan.timed_tokens, spec.num_streams, channels, tiles)
    forward = formula.forward(channels, spec, tiles, 2)
    backward = formula.backward(channels, spec, tiles, 2, splits)
    ahead, back = (part.per_token * plan.timed_tokens + part.constants for part in (forward, backward))
    return {"forward": ahead, "both": ahead + back}


def token_times(channels: int, plan: Plan) -> Outcome:
    """Milliseconds of the token kernels and of torch's own operations, bf16, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    num_tokens, experts, chosen = plan.timed_tokens, 16, 4
    expert_TK = torch.stack(
        [torch.randperm(experts, generator=generator)[:chosen] for _ in range(num_tokens)]
    )
    order = tokens.order_by_expert(expert_TK.to(plan.device), experts)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator).to(plan.device, torch.bfloat16)
        return drawn.requires_grad_()

    x, rows, gate_up = (draw(r, channels) for r in (num_tokens, *2 * [num_tokens * chosen]))
    weight_TK = torch.rand(num_tokens, chosen, generator=generator).to(plan.device).requires_grad_()
    d_rows, d_x, d_act = rows.detach(), x.detach(), gate_up.detach()[:, : channels // 2].contiguous()
    place_R = order.place_TK.flatten()

    def summed() -> torch.Tensor:
        weight_R = torch.empty_like(weight_TK.flatten()).index_put((place_R,), weight_TK.flatten())
        scaled_RC = rows * weight_R.unsqueeze(1).to(rows.dtype)
        return torch.zeros_like(x).index_add(0, order.token_R, scaled_RC)

    def gated() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    contenders: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor], torch.Tensor]] = {
        "permute": (lambda: tokens.permute(x, order), [x], d_rows),
        "permute torch": (lambda: x.index_select(0, order.token_R), [x], d_rows),
        "unpermute": (lambda: tokens.unpermute(rows, weight_TK, order), [rows, weight_TK], d_x),
        "unpermute torch": (summed, [rows, weight_TK], d_x),
        "swiglu": (lambda: tokens.swiglu(gate_up), [gate_up], d_act),
        "swiglu torch": (gated, [gate_up], d_act),
    }
    row: dict[str, Any] = {"num_tokens": num_tokens, "channels": channels}
    for name, (forward, inputs, gradient) in contenders.items():
        row[f"{name} ms"] = milliseconds(
            lambda forward=forward, inputs=inputs, gradient=gradient: torch.autograd.grad(  # type: ignore[misc]
                forward(), inputs, gradient
            )
        )
    return Outcome(True, row)
