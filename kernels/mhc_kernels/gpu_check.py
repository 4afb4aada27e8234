"""Checks that need a GPU: `python -m mhc_kernels.gpu_check [--output results/kernels]`.

Parity of every kernel with the fp64 reference on the device, bit-equality of recompute and of two runs, and
timings by `triton.testing.do_bench`, written with the device's name. Without a GPU it says so, loudly, and
ends with status 0 having checked nothing; `--require` makes that an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
"""Largest relative error in norm of outputs and gradients; bf16 streams carry 8 bits and tf32 products 11."""


class Problem:
    """Inputs of one `cross` on the device, and the same numbers in fp64."""

    def __init__(self, spec: ConnectionSpec, num_tokens: int, channels: int, dtype: torch.dtype) -> None:
        n, m = spec.num_streams, spec.num_coefficients
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, into: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to("cuda", into).requires_grad_()

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
    spec: ConnectionSpec, channels: int, dtype: torch.dtype, num_tokens: int = 130
) -> dict[str, Any]:
    """Largest relative error, determinism and recompute of one case."""
    problem = Problem(spec, num_tokens, channels, dtype)
    backend = make_backend("triton")
    ours = problem.run_with_gradients(backend)
    again = problem.run_with_gradients(backend)
    exact = problem.widened().run_with_gradients(make_backend("reference"))
    errors = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(ours, exact, strict=True)
    ]
    seam = problem.run(backend)
    kept = Kept(seam.pre_TN, seam.rstd_T, problem.connection.gain_C, seam.post_TN, seam.res_TNN, problem.y)
    first, second = backend.recompute_block(seam.streams_TNC.detach(), [kept, kept])
    closed = backend.close(seam.streams_TNC, problem.y, seam.post_TN, seam.res_TNN)
    limit = FP32_LIMIT if dtype == torch.float32 else BF16_LIMIT
    return {
        "spec": str(spec),
        "channels": channels,
        "dtype": str(dtype),
        "largest_error": max(errors),
        "limit": limit,
        "deterministic": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
        "recompute_bit_equal": torch.equal(first.h_TC, seam.h_TC) and torch.equal(second.streams_TNC, closed),
        "passed": max(errors) <= limit,
    }


def check_tokens(num_tokens: int = 300, channels: int = 512) -> dict[str, Any]:
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

    there, again, here = through("cuda"), through("cuda"), through("cpu")
    errors = [((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(there, here, strict=True)]
    deterministic = all(torch.equal(a, b) for a, b in zip(there, again, strict=True))
    return {
        "largest_error": max(errors),
        "limit": FP32_LIMIT,
        "deterministic": deterministic,
        "passed": deterministic and max(errors) <= FP32_LIMIT,
    }


def chunked_backend() -> SeamBackend:
    """`triton`, launched in chunks of tokens: timed here, because only a device can say whether it pays."""
    from mhc_kernels.triton_backend import TritonOperations, check_device

    return FunctionBackend("triton in chunks", TritonOperations(chunked=True), check_device)


def time_case(channels: int, num_tokens: int = 4096) -> dict[str, Any]:
    """Milliseconds of one bf16 seam, forward and both ways, and the bandwidth the forward reaches."""
    from triton.testing import do_bench  # type: ignore[import-untyped]

    problem = Problem(ConnectionSpec(num_streams=4), num_tokens, channels, torch.bfloat16)
    row: dict[str, Any] = {"channels": channels, "num_tokens": num_tokens}
    backends = {
        "triton": make_backend("triton"),
        "chunked": chunked_backend(),
        "reference": make_backend("reference"),
    }
    for name, backend in backends.items():
        with torch.no_grad():
            row[f"{name}_forward_ms"] = do_bench(lambda backend=backend: problem.run(backend))
        row[f"{name}_both_ms"] = do_bench(lambda backend=backend: problem.run_with_gradients(backend))
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
    cases = [check_case(spec, c, dtype) for spec, c in CASES for dtype in (torch.float32, torch.bfloat16)]
    device = torch.cuda.get_device_name()
    report = {
        "device": device,
        "torch": torch.__version__,
        "cases": cases,
        "tokens": (token_case := check_tokens()),
        "timings": [time_case(channels) for channels in (1280, 2560, 4096)],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"gpu_{device.lower().replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if not token_case["passed"]:
        print("gpu-check: the token kernels of the mixture of experts FAILED", file=sys.stderr)
    failed = [c for c in cases if not (c["passed"] and c["deterministic"] and c["recompute_bit_equal"])]
    print(
        f"gpu-check on {device}: {len(cases) - len(failed)} of {len(cases)} cases passed, written to {path}"
    )
    sys.exit(1 if failed or not token_case["passed"] else 0)


if __name__ == "__main__":
    main()
