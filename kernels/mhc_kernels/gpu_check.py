"""Checks that need a GPU: `python -m mhc_kernels.gpu_check [--output results/kernels]`.

Parity of every kernel with the fp64 reference on the device, launches in chunks included, bit-equality of
recompute and of two runs, and timings by `triton.testing.do_bench`, written with the device's name.

Exit status: 0 all passed, 1 something failed. Without a GPU it says so, loudly, and ends with status 0 having
checked nothing; with `--require` that is status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_kernels import tokens
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.seam import Connection, ConnectionSpec, Kept, Mixing, Seam, SeamBackend, make_backend

CASES = [
    (ConnectionSpec(num_streams=4), 1280),
    (ConnectionSpec(num_streams=4, sinkhorn_eps=1e-6, pre_eps=1e-6), 2560),
    (ConnectionSpec(num_streams=2), 192),
    (ConnectionSpec(num_streams=8), 512),
    (ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY), 1280),
    (ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS), 1280),
]
FP32_LIMIT, BF16_LIMIT = 1e-5, 2e-2
"""Largest relative error in norm of outputs and gradients; bf16 streams carry 8 bits and tf32 products 11.
Where a sum cancels: twice the error that the reference makes in the same precision."""


class Plan(NamedTuple):
    """What is checked and timed, and where; the tests run a small one in the interpreter."""

    device: str = "cuda"
    cases: Sequence[tuple[ConnectionSpec, int]] = CASES
    chunked_cases: Sequence[tuple[ConnectionSpec, int]] = CASES[:1]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    num_tokens: int = 130
    token_rows: tuple[int, int] = (300, 512)
    timed_channels: Sequence[int] = (1280, 2560, 4096)
    timed_tokens: int = 4096


class Problem:
    """Inputs of one `cross` on the device, and the same numbers in fp64."""

    def __init__(
        self, spec: ConnectionSpec, num_tokens: int, channels: int, dtype: torch.dtype, device: str
    ) -> None:
        n, m = spec.num_streams, spec.num_coefficients
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, into: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, into).requires_grad_()

        self.streams = draw(num_tokens, n, channels, into=dtype)
        self.y = draw(num_tokens, channels, into=dtype)
        self.post = draw(num_tokens, n)
        self.res = None if spec.mixing is Mixing.IDENTITY else draw(num_tokens, n, n)
        width = n * channels
        self.connection = Connection(
            draw(m, width, scale=width**-0.5), draw(3), draw(m), draw(channels), spec
        )

    def widened(self) -> Problem:
        wide = object.__new__(Problem)
        wide.streams, wide.y, wide.post = (_widen(t) for t in (self.streams, self.y, self.post))
        wide.res = None if self.res is None else _widen(self.res)
        phi, alpha, bias, gain, spec = self.connection
        wide.connection = Connection(_widen(phi), _widen(alpha), _widen(bias), _widen(gain), spec)
        return wide

    def leaves(self) -> list[Tensor]:
        optional = [] if self.res is None else [self.res]
        return [self.streams, self.y, self.post, *optional, *self.connection[:4]]

    def run(self, backend: SeamBackend) -> Seam:
        return backend.cross(self.streams, self.y, self.post, self.res, self.connection)

    def run_with_gradients(self, backend: SeamBackend) -> list[Tensor]:
        seam = self.run(backend)
        outputs = [t for t in (seam.streams_TNC, seam.h_TC, seam.post_TN, seam.res_TNN) if t is not None]
        weights = [
            torch.sin(torch.arange(t.numel(), device=t.device)).view_as(t).to(t.dtype) for t in outputs
        ]
        return [*outputs, *torch.autograd.grad(outputs, self.leaves(), weights)]


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def check_case(
    backend: SeamBackend,
    spec: ConnectionSpec,
    channels: int,
    dtype: torch.dtype,
    num_tokens: int,
    device: str,
) -> dict[str, Any]:
    """Largest relative error, determinism and recompute of one case."""
    problem = Problem(spec, num_tokens, channels, dtype, device)
    ours = problem.run_with_gradients(backend)
    again = problem.run_with_gradients(backend)
    exact = problem.widened().run_with_gradients(make_backend("reference"))
    plain = problem.run_with_gradients(make_backend("reference"))
    errors, unavoidable = (
        [
            ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
            for a, b in zip(some, exact, strict=True)
        ]
        for some in (ours, plain)
    )
    seam = problem.run(backend)
    kept = Kept(seam.pre_TN, seam.rstd_T, problem.connection.gain_C, seam.post_TN, seam.res_TNN, problem.y)
    first, second = backend.recompute_block(seam.streams_TNC.detach(), [kept, kept])
    closed = backend.close(seam.streams_TNC, problem.y, seam.post_TN, seam.res_TNN)
    limit = FP32_LIMIT if dtype == torch.float32 else BF16_LIMIT
    return {
        "backend": backend.name,
        "spec": str(spec),
        "num_tokens": num_tokens,
        "channels": channels,
        "dtype": str(dtype),
        "largest_error": max(errors),
        "largest_error_of_reference": max(unavoidable),
        "limit": limit,
        "deterministic": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
        "recompute_bit_equal": torch.equal(first.h_TC, seam.h_TC) and torch.equal(second.streams_TNC, closed),
        "passed": all(e <= max(limit, 2 * u) for e, u in zip(errors, unavoidable, strict=True)),
    }


def check_tokens(num_tokens: int, channels: int, device: str) -> dict[str, Any]:
    """The token kernels of the mixture of experts against their CPU paths, in fp32, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    expert_TK = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(num_tokens)])
    x_TC = torch.randn(num_tokens, channels, generator=generator)
    weight_TK = torch.rand(num_tokens, 4, generator=generator)

    def through(device: str) -> list[Tensor]:
        leaves = [t.to(device).requires_grad_() for t in (x_TC, weight_TK)]
        order = tokens.order_by_expert(expert_TK.to(device), 16)
        rows = tokens.swiglu(tokens.permute(leaves[0], order))
        y_TC = tokens.unpermute(rows, leaves[1], order)
        return [y_TC, *torch.autograd.grad(y_TC.square().sum(), leaves)]

    there, again, here = through(device), through(device), through("cpu")
    errors = [((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(there, here, strict=True)]
    deterministic = all(torch.equal(a, b) for a, b in zip(there, again, strict=True))
    return {
        "largest_error": max(errors),
        "limit": FP32_LIMIT,
        "deterministic": deterministic,
        "passed": deterministic and max(errors) <= FP32_LIMIT,
    }


def chunked_backend() -> SeamBackend:
    """`triton`, launched in chunks of tokens: only a device can say whether that pays."""
    from mhc_kernels.triton_backend import TritonOperations, check_device

    return FunctionBackend("triton in chunks", TritonOperations(chunked=True), check_device)


def time_case(
    bench: Callable[[Callable[[], object]], float],
    channels: int,
    num_tokens: int,
    device: str,
) -> dict[str, Any]:
    """Milliseconds of one bf16 seam, forward and both ways, and the bandwidth the forward reaches."""
    problem = Problem(ConnectionSpec(num_streams=4), num_tokens, channels, torch.bfloat16, device)
    row: dict[str, Any] = {"channels": channels, "num_tokens": num_tokens}
    backends = {
        "triton": make_backend("triton"),
        "chunked": chunked_backend(),
        "reference": make_backend("reference"),
    }
    for name, backend in backends.items():
        with torch.no_grad():
            row[f"{name}_forward_ms"] = bench(partial(problem.run, backend))
        row[f"{name}_both_ms"] = bench(partial(problem.run_with_gradients, backend))
    moved = 14 * num_tokens * channels * problem.streams.element_size()
    row["forward_gigabytes_per_second"] = moved / row["triton_forward_ms"] / 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("results/kernels"))
    parser.add_argument("--require", action="store_true", help="no GPU is an error")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: SKIPPED, torch sees no GPU. NOTHING WAS CHECKED on a device.", file=sys.stderr)
        sys.exit(1 if arguments.require else 0)
    from triton.testing import do_bench  # type: ignore[import-untyped]

    sys.exit(check_device(Plan(), torch.cuda.get_device_name(), arguments.output, do_bench))


def chunked_tokens(spec: ConnectionSpec, channels: int, dtype: torch.dtype, device: str) -> int:
    """Enough for two chunks and a rest."""
    from mhc_kernels import tiles
    from mhc_kernels.launch.architecture import device_architecture

    architecture = device_architecture(torch.device(device))
    return 2 * tiles.chunk_tokens(architecture, spec.num_streams, channels, dtype.itemsize) + 2


def check_device(
    plan: Plan, device_name: str, output: Path, bench: Callable[[Callable[[], object]], float]
) -> int:
    """Run everything, write the report, say what failed; the exit status."""
    plain, chunked, device = make_backend("triton"), chunked_backend(), plan.device
    cases = []
    for dtype in plan.dtypes:
        for spec, channels in plan.cases:
            cases.append(check_case(plain, spec, channels, dtype, plan.num_tokens, device))
        for spec, channels in plan.chunked_cases:
            num_tokens = chunked_tokens(spec, channels, dtype, device)
            cases.append(check_case(chunked, spec, channels, dtype, num_tokens, device))
    token_case = check_tokens(*plan.token_rows, device)
    report = {
        "device": device_name,
        "torch": torch.__version__,
        "cases": cases,
        "tokens": token_case,
        "timings": [
            time_case(bench, channels, plan.timed_tokens, device) for channels in plan.timed_channels
        ],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"gpu_{device_name.lower().replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    failed = [c for c in cases if not (c["passed"] and c["deterministic"] and c["recompute_bit_equal"])]
    for case in failed:
        print(f"gpu-check: FAILED {case}", file=sys.stderr)
    if not token_case["passed"]:
        print("gpu-check: FAILED, the token kernels of the mixture of experts", file=sys.stderr)
    passed = f"{len(cases) - len(failed)} of {len(cases)}"
    print(f"gpu-check on {device_name}: {passed} cases passed, written to {path}")
    return 1 if failed or not token_case["passed"] else 0


if __name__ == "__main__":
    main()
