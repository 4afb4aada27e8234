"""Time one seam, forward and backward, on this CPU: `python -m mhc_kernels.bench_cpu [--json FILE]`.

All backends alternate within one run, so that other load falls on all of them; figures are medians over
rounds and ratios to the reference (the naive eager form). Beside them stand the parts of the bound, measured
here: the bytes at copy bandwidth, the three skinny matrix products, and the page faults of fresh memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mhc_kernels.provenance import provenance
from mhc_kernels.seam import BackendName, Connection, ConnectionSpec, SeamBackend, make_backend

FORWARD_UNITS, BACKWARD_UNITS = 14, 20
"""Passes of (T, C) size that the seam needs when nothing stays in a cache between its two halves (README)."""


class SeamProblem:
    """Inputs and incoming gradients of one `cross`."""

    def __init__(self, num_tokens: int, channels: int, num_streams: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).requires_grad_()

        spec = ConnectionSpec(num_streams=num_streams)
        coefficients = spec.num_coefficients
        self.streams_TNC, self.y_TC = draw(num_tokens, num_streams, channels), draw(num_tokens, channels)
        self.post_TN, self.res_TNN = draw(num_tokens, num_streams), draw(num_tokens, num_streams, num_streams)
        self.connection = Connection(
            draw(coefficients, num_streams * channels), draw(3), draw(coefficients), draw(channels), spec
        )

    def run(self, backend: SeamBackend) -> tuple[float, float]:
        """Seconds of forward and backward."""
        begin = time.perf_counter()
        seam = backend.cross(self.streams_TNC, self.y_TC, self.post_TN, self.res_TNN, self.connection)
        middle = time.perf_counter()
        assert seam.res_TNN is not None
        outputs = [seam.streams_TNC, seam.h_TC, seam.post_TN, seam.res_TNN]
        inputs = [self.streams_TNC, self.y_TC, self.post_TN, self.res_TNN, *self.connection[:4]]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
        return middle - begin, time.perf_counter() - middle


def best_seconds(action: Callable[[], object], rounds: int = 5) -> float:
    action()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def bound(problem: SeamProblem) -> dict[str, float]:
    """Milliseconds that the parts of the bound take here."""
    streams_TNC, phi_MD = problem.streams_TNC.detach(), problem.connection.phi_MD.detach()
    x_TD, target = streams_TNC.flatten(1), torch.empty_like(streams_TNC)
    copy_s = best_seconds(lambda: target.copy_(streams_TNC))
    bandwidth = 2 * streams_TNC.nbytes / copy_s
    row_bytes = streams_TNC.nbytes / streams_TNC.shape[1]
    mix_TM = x_TD @ phi_MD.T
    products_s = best_seconds(lambda: torch.mm(x_TD, phi_MD.T)) + best_seconds(
        lambda: torch.mm(mix_TM.T, x_TD)
    )
    products_s += best_seconds(lambda: torch.mm(mix_TM, phi_MD, out=target.flatten(1)))
    fresh_s = best_seconds(lambda: torch.empty_like(streams_TNC).fill_(0.0))
    return {
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "bytes_ms": 1e3 * (FORWARD_UNITS + BACKWARD_UNITS) * row_bytes / bandwidth,
        "matrix_products_ms": 1e3 * products_s,
        "fresh_memory_ms": 2e3 * max(0.0, fresh_s - best_seconds(lambda: target.fill_(0.0))),
    }


def measure(backends: list[BackendName], num_tokens: int, channels: int, rounds: int) -> dict[str, object]:
    problem = SeamProblem(num_tokens, channels)
    made = {name: make_backend(name) for name in backends}
    first_call_s = {}
    for name, backend in made.items():
        begin = time.perf_counter()
        problem.run(backend)
        first_call_s[name] = time.perf_counter() - begin
    times: dict[BackendName, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, backend in made.items():
            times[name].append(problem.run(backend))
    totals = {name: statistics.median(f + b for f, b in pairs) for name, pairs in times.items()}
    naive = totals[backends[0]]
    return {
        "num_tokens": num_tokens,
        "channels": channels,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "provenance": provenance("mhc_kernels.bench_cpu"),
        "bound": bound(problem),
        "backends": {
            name: {
                "forward_ms": 1e3 * statistics.median(f for f, _ in times[name]),
                "backward_ms": 1e3 * statistics.median(b for _, b in times[name]),
                "total_ms": 1e3 * total,
                "ratio_to_reference": total / naive,
                "first_call_s": first_call_s[name],
            }
            for name, total in totals.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--without-compiled", action="store_true", help="leave out torch.compile's long start"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backends: list[BackendName] = ["reference", "cpu"]
    if not arguments.without_compiled:
        backends.append("compiled")
    figures = measure(backends, arguments.tokens, arguments.channels, arguments.rounds)
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
