"""Time token movement against torch's own on this CPU: `python -m mhc_kernels.bench_tokens [--json FILE]`.

Forward + backward on one thread, all contenders in turn within every round, medians of CPU time (which a busy
machine disturbs less than wall time). This is the measurement that decided what tokens.py writes by hand and
what it leaves to torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor

from mhc_kernels import tokens
from mhc_kernels.provenance import provenance


def contenders(
    num_tokens: int, channels: int, width: int, experts: int, chosen: int
) -> dict[str, Callable[[], object]]:
    """Named actions, each a forward and a backward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    expert_TK = torch.stack(
        [torch.randperm(experts, generator=generator)[:chosen] for _ in range(num_tokens)]
    )
    order = tokens.order_by_expert(expert_TK, experts)
    rows = num_tokens * chosen
    x, y, weight = (
        draw(*s).requires_grad_() for s in ((num_tokens, channels), (rows, channels), (num_tokens, chosen))
    )
    gate_up, bank = (
        draw(rows, 2 * width).requires_grad_(),
        draw(experts, channels, 2 * width).requires_grad_(),
    )
    d_rows, d_out, d_act, d_up = (
        draw(rows, channels),
        draw(num_tokens, channels),
        draw(rows, width),
        draw(rows, 2 * width),
    )
    counts = order.rows_per_expert_E.tolist()

    def index_add() -> Tensor:
        weight_R = torch.empty(rows).index_put((order.place_TK.flatten(),), weight.flatten())
        return torch.zeros(num_tokens, channels).index_add(0, order.token_R, y * weight_R.unsqueeze(1))

    class Gathered(torch.autograd.Function):
        """The alternative that lost: a backward that gathers a token's rows instead of scattering them."""

        @staticmethod
        def forward(ctx: Any, x_TC: Tensor) -> Tensor:
            return x_TC.index_select(0, order.token_R)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Tensor:
            rows_RC = grads[0].index_select(0, order.place_TK.flatten())
            d_x_TC: Tensor = rows_RC.view(num_tokens, chosen, channels).sum(1)
            return d_x_TC

    def gathered() -> Tensor:
        return cast(Tensor, Gathered.apply(x))

    def swiglu() -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return functional.silu(gate) * up

    def loop() -> Tensor:
        return torch.cat([part @ one for part, one in zip(y.split(counts), bank, strict=True)])

    def both_ways(
        forward: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor
    ) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), inputs, gradient)

    return {
        "permute torch": both_ways(lambda: x.index_select(0, order.token_R), [x], d_rows),
        "permute gathered": both_ways(gathered, [x], d_rows),
        "unpermute torch": both_ways(index_add, [y, weight], d_out),
        "unpermute ours": both_ways(lambda: tokens.unpermute(y, weight, order), [y, weight], d_out),
        "swiglu torch": both_ways(swiglu, [gate_up], d_act),
        "grouped loop": both_ways(loop, [y, bank], d_up),
        "grouped torch": both_ways(
            lambda: tokens.grouped_matmul(y, bank, order.rows_per_expert_E), [y, bank], d_up
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    actions = contenders(
        arguments.tokens, arguments.channels, arguments.width, arguments.experts, arguments.chosen
    )
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(arguments.rounds + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            times[name].append(time.process_time() - begin)
    figures = {
        "provenance": provenance("mhc_kernels.bench_tokens"),
        "median_ms": {name: 1e3 * statistics.median(measured[1:]) for name, measured in times.items()},
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
