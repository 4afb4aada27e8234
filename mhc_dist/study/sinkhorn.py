"""Sinkhorn study: how many iterations, which eps, which input precision, against exact mixes.

Random logits of several widths stand for mixes near uniform, as early in training, and near permutations. The
composite gain is that of 48 independent mixes, the sublayers of 24 layers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mhc_kernels.reference import kronecker_product, permutation_mixture, sinkhorn
from torch import Tensor

from mhc_dist.bench.result import write_result
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.observe.stability import amax_gain, composite, stochastic_residual
from mhc_dist.study.plots import plot_sinkhorn

NAME = "study_sinkhorn"
NUM_STREAMS, NUM_SUBLAYERS = 4, 48
ITERATIONS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40)
WIDTHS = (1.0, 3.0, 6.0)
EPS = {"paper": 0.0, "deepseek_v4": 1e-6}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "mhc_lite": (math.factorial(NUM_STREAMS), partial(permutation_mixture, num_streams=NUM_STREAMS)),
    "krom n=8": (3, kronecker_product),
}
"""Number of logits, and the mixes made of them without iterations."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist study sinkhorn", description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="mixes of each sublayer (256)")
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        print(f"mhc-dist: --tokens {options.tokens}: at least 1 is needed", file=sys.stderr)
        return ExitCode.USAGE
    figures = run(options.tokens)
    command = " ".join(["mhc-dist study sinkhorn", *(sys.argv[1:] if arguments is None else arguments)])
    label = "measured: rounding and convergence on a CPU, random logits"
    path = write_result(NAME, options.results, command, label, figures)
    picture = plot_sinkhorn(figures, options.results / f"{NAME}.png")
    print(f"{label}; written to {path} and {picture}")
    print(json.dumps(figures["exact"]))
    return ExitCode.OK


def run(num_tokens: int) -> dict[str, Any]:
    """Residuals and gains by case, and those of the exact mixes."""
    cases: dict[str, dict[str, list[float]]] = {}
    for width in WIDTHS:
        logits = random_logits(num_tokens, NUM_STREAMS**2, width)
        references = {iterations: in_fp64(logits, iterations) for iterations in ITERATIONS}
        for dtype_name, dtype in DTYPES.items():
            rounded = logits.to(dtype).float().unflatten(-1, (NUM_STREAMS, NUM_STREAMS))
            for eps_name, eps in EPS.items():
                case: dict[str, list[float]] = {"iterations": list(ITERATIONS)}
                for iterations in ITERATIONS:
                    mixes = sinkhorn(rounded.flatten(0, 1), iterations, eps).unflatten(0, rounded.shape[:2])
                    figures = measure(mixes)
                    figures["difference"] = (mixes - references[iterations]).abs().max().item()
                    for key, value in figures.items():
                        case.setdefault(key, []).append(value)
                cases[f"width {width:g}, {dtype_name}, {eps_name}"] = case
    exact = {}
    for width in WIDTHS:
        for kind, (num_logits, mixes_of) in EXACT.items():
            logits = random_logits(num_tokens, num_logits, width)
            reference = mixes_of(logits.double().flatten(0, 1))
            for dtype_name, dtype in DTYPES.items():
                mixes = mixes_of(logits.to(dtype).float().flatten(0, 1))
                figures = measure(mixes.unflatten(0, logits.shape[:2]))
                figures["difference"] = (mixes - reference).abs().max().item()
                exact[f"{kind}, width {width:g}, {dtype_name}"] = figures
    return {"num_tokens": num_tokens, "num_sublayers": NUM_SUBLAYERS, "cases": cases, "exact": exact}


def random_logits(num_tokens: int, num_logits: int, width: float) -> Tensor:
    """(sublayers, tokens, logits) fp32, normal with standard deviation `width`; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return width * torch.randn(NUM_SUBLAYERS, num_tokens, num_logits, generator=generator)


def in_fp64(logits_LTM: Tensor, iterations: int) -> Tensor:
    """The paper's Sinkhorn, next to unrounded: what `difference` is from. (sublayers, tokens, n, n)."""
    square = logits_LTM.double().unflatten(-1, (NUM_STREAMS, NUM_STREAMS))
    mixes: Tensor = sinkhorn(square.flatten(0, 1), iterations, 0.0)
    return mixes.view_as(square)


def measure(mixes_LTNN: Tensor) -> dict[str, float]:
    """Worst residuals over sublayers and tokens; the larger of the composite's two gains."""
    exact_LTNN = mixes_LTNN.double()
    residual = stochastic_residual(exact_LTNN.flatten(0, 1))
    gain = amax_gain(composite(list(exact_LTNN)))
    return {
        "row_residual": residual.rows,
        "column_residual": residual.columns,
        "gain": max(gain.forward, gain.backward),
    }


if __name__ == "__main__":
    sys.exit(main())
