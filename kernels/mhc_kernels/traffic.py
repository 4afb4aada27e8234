"""Bytes a sublayer moves, counted: `python -m mhc_kernels.traffic [--json]`.

The kernels run in Triton's interpreter, which sees every load and store. Two token counts are run and the
slope is taken, so weights and other constants drop out. Unit: C, one row of channels per token in the dtype
of the streams. Unique bytes are what device memory must move when repeats hit a cache; requested
bytes are what the kernel asks for. Everything is counted: coefficients, partial sums, and torch operations
around the kernels.

forward    one seam forward (post_project, mix_pre)
backward   one seam backward (backward_dots, backward_apply, at n = 8 backward_phi, then the sums)
recompute  one more sublayer in a recompute block
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mhc_kernels import formula, interpreted
from mhc_kernels.check import check_streams
from mhc_kernels.launch.backward import seam_backward
from mhc_kernels.launch.forward import seam_forward
from mhc_kernels.launch.recompute import recompute_block
from mhc_kernels.launch.sizes import token_splits
from mhc_kernels.provenance import provenance
from mhc_kernels.seam_function import SeamGradients, Update
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing
from mhc_kernels.tiles import ARCHITECTURES, CHUNK_MULTIPLE, L2_BYTES, chunk_tokens, tiles_for

FIELD = {
    "naive (paper, table 2)": (34.0, None, None, None),
    "paper / TileKernels": (18.0, 39.0, 6.0, 63.0),
    "Megatron dev (cuTile)": (18.0, 53.0, 14.0, 85.0),
    "TransformerEngine": (18.0, 59.0, 14.0, 91.0),
    "Liger": (38.0, 111.0, 14.0, 163.0),
}
"""(forward, backward, recompute, total) in C, from reading each implementation, without the RMSNorm."""

TOKEN_COUNTS = (64, 128)
CHUNKED_TOKEN_COUNTS = (2 * CHUNK_MULTIPLE, 3 * CHUNK_MULTIPLE)
LONGEST_BLOCK = 3
STREAM_ARGUMENTS = ("x_ptr", "y_ptr", "out_ptr", "h_ptr", "g_ptr", "d_h_ptr", "d_x_ptr", "d_y_ptr")


class Phase:
    """Traffic of one phase at one token count."""

    def __init__(self, launches: list[interpreted.LaunchTraffic], torch_moved: dict[str, int]) -> None:
        self.launches = launches
        self.torch_moved = torch_moved

    def kernels(self) -> dict[str, dict[str, float]]:
        """Per kernel: unique and requested bytes in both directions, and the part that is streams."""
        rows: dict[str, dict[str, float]] = {}
        for one in self.launches:
            row = rows.setdefault(one.kernel, dict.fromkeys(ROW_KEYS, 0.0))
            row["loaded"] += sum(one.loaded_bytes.values())
            row["stored"] += sum(one.stored_bytes.values())
            row["requested_loaded"] += sum(one.requested_loads.values())
            row["requested_stored"] += sum(one.requested_stores.values())
            moved = [*one.loaded_bytes.items(), *one.stored_bytes.items()]
            row["streams"] += sum(count for name, count in moved if _is_stream(one.kernel, name))
        return rows


ROW_KEYS = ("loaded", "stored", "requested_loaded", "requested_stored", "streams")


def _is_stream(kernel: str, name: str) -> bool:
    stem = name.split("[")[0].replace("_ptrs", "_ptr")
    return stem in STREAM_ARGUMENTS and not kernel.startswith("reduce_")


class Sublayer:
    """Random inputs of one seam at a token count."""

    def __init__(self, num_tokens: int, channels: int, spec: ConnectionSpec, dtype: torch.dtype) -> None:
        n, m = spec.num_streams, spec.num_coefficients
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.streams = draw(num_tokens, n, channels).to(dtype)
        self.update = Update(
            draw(num_tokens, channels).to(dtype), draw(num_tokens, n), draw(num_tokens, n, n)
        )
        if spec.num_res_coefficients == 0:
            self.update = self.update._replace(res_TNN=None)
        self.connection = Connection(draw(m, n * channels), draw(3), draw(m), draw(channels), spec)
        check_streams(self.streams)
        self.carried = draw(num_tokens, n) if spec.shifted_pre else None
        self.forward = seam_forward(self.streams, self.update, self.connection, self.carried)

        self.gradients = SeamGradients(
            draw(num_tokens, n, channels).to(dtype),
            draw(num_tokens, channels).to(dtype),
            self.carried,
            draw(num_tokens, n),
            None if self.update.res_TNN is None else draw(num_tokens, n, n),
        )
        self.kept = [self._keep_copy() for _ in range(LONGEST_BLOCK)]

    def _keep_copy(self) -> Kept:
        """Own memory for each sublayer of a block, as in a model."""
        y_TC, post_TN, res_TNN = self.update
        return Kept(
            self.forward.pre_TN.clone(),
            self.forward.rstd_T.clone(),
            self.connection.gain_C.clone(),
            post_TN.clone(),
            None if res_TNN is None else res_TNN.clone(),
            y_TC.clone(),
        )

    def run_forward(self, chunk_tokens: int = 0) -> None:
        seam_forward(self.streams, self.update, self.connection, self.carried, chunk_tokens)

    def run_backward(self, chunk_tokens: int = 0) -> None:
        seam_backward(
            *(self.streams, self.update, self.connection, self.carried, self.forward.saved, self.gradients),
            chunk_tokens,
        )

    def run_recompute(self, sublayers: int) -> None:
        recompute_block(self.streams, self.kept[:sublayers])


def count(action: Callable[[], None]) -> Phase:
    """Run `action` and count; torch operations inside the kernels' interpretation are not counted."""
    with interpreted.counted_traffic() as counter, interpreted.TorchTrafficMode(counter) as torch_traffic:
        action()
    return Phase(counter.launches, torch_traffic.moved)


def per_token(action_of: Callable[[int], Phase], channels: int, item_bytes: int) -> dict[str, Any]:
    """Slopes between the two token counts, in units of C."""
    few, many = (action_of(num_tokens) for num_tokens in TOKEN_COUNTS)
    unit = (TOKEN_COUNTS[1] - TOKEN_COUNTS[0]) * channels * item_bytes

    def slope(small: float, large: float) -> float:
        return (large - small) / unit

    kernels = {
        name: {key: slope(few.kernels()[name][key], row[key]) for key in ROW_KEYS}
        for name, row in many.kernels().items()
    }
    torch_operations = {
        name: slope(few.torch_moved.get(name, 0), moved) for name, moved in many.torch_moved.items()
    }
    return {
        "kernels": kernels,
        "torch_operations": {name: value for name, value in torch_operations.items() if value},
        "total": sum(row["loaded"] + row["stored"] for row in kernels.values())
        + sum(torch_operations.values()),
        "streams": sum(row["streams"] for row in kernels.values()),
    }


def difference(more: Any, less: Any) -> Any:
    """Entry by entry: what one sublayer more in a recompute block costs (its first load is shared)."""
    if isinstance(more, dict):
        return {key: difference(value, less.get(key, 0.0)) for key, value in more.items()}
    return more - less


def chunked_bytes(
    channels: int, spec: ConnectionSpec, dtype: torch.dtype, tokens: Sequence[int]
) -> dict[str, float]:
    """Bytes from and to memory per token, in C, behind a cache, when a seam is launched in chunks.

    The cache and the chunk are scaled down together from the device's: the chunk is the shortest one, the
    cache what `tiles.chunk_tokens` wants for it, and room for what does not grow with the tokens (phi, the
    partial dphi). Three chunks are compared with two.
    """
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    n, m = spec.num_streams, spec.num_coefficients
    rows = (2 * n + 2) * channels * item_bytes * CHUNK_MULTIPLE
    constants = 4 * (2 * m * n * channels + 4 * channels)
    moved: dict[str, list[int]] = {"forward": [], "backward": []}
    for num_tokens in tokens:
        sublayer = Sublayer(num_tokens, channels, spec, dtype)
        for name, action in (("forward", sublayer.run_forward), ("backward", sublayer.run_backward)):
            cache = interpreted.CacheModel(2 * rows + constants)
            with interpreted.counted_traffic(cache):
                action(CHUNK_MULTIPLE)
            cache.flush()
            moved[name].append(cache.loaded_bytes + cache.stored_bytes)
    unit = (tokens[1] - tokens[0]) * channels * item_bytes
    return {name: (many - few) / unit for name, (few, many) in moved.items()}


def measure_chunked(channels: int, spec: ConnectionSpec, dtype: torch.dtype) -> dict[str, Any]:
    """What launches in chunks make of a sublayer, and on which devices the chunk is long enough to matter."""
    interpreted.require_interpreter()
    phases = chunked_bytes(channels, spec, dtype, CHUNKED_TOKEN_COUNTS)
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    recompute = formula.recompute(channels, spec, item_bytes).per_token / (channels * item_bytes)
    phases |= {"recompute": recompute}
    devices = []
    for architecture in ARCHITECTURES:
        tokens = chunk_tokens(architecture, spec.num_streams, channels, item_bytes)
        tiles = tiles_for(architecture, spec.num_streams, channels, item_bytes)
        apply_blocks = -(-channels // tiles.backward_apply.channels)
        devices.append(
            {
                "architecture": architecture,
                "l2_bytes": L2_BYTES[architecture],
                "chunk_tokens": tokens,
                "post_project_programs": -(-tokens // tiles.post_project.tokens) * tiles.project_splits,
                "backward_apply_programs": apply_blocks
                * token_splits(tokens, channels, tiles.backward_apply),
            }
        )
    return {
        "unit": "C: one row of channels per token",
        "label": "counted in the interpreter behind a modelled cache; no device was involved",
        "channels": channels,
        "num_streams": spec.num_streams,
        "mixing": str(spec.mixing),
        "shifted_pre": spec.shifted_pre,
        **phases,
        "total": sum(phases.values()),
        "devices": devices,
    }


def measure(channels: int, spec: ConnectionSpec, dtype: torch.dtype) -> dict[str, Any]:
    """Traffic of one sublayer: forward, backward, recompute and their total."""
    interpreted.require_interpreter()
    sublayers = {t: Sublayer(t, channels, spec, dtype) for t in TOKEN_COUNTS}
    item_bytes = torch.empty(0, dtype=dtype).element_size()

    def block(length: int) -> dict[str, Any]:
        return per_token(lambda t: count(lambda: sublayers[t].run_recompute(length)), channels, item_bytes)

    phases = {
        "forward": per_token(lambda t: count(sublayers[t].run_forward), channels, item_bytes),
        "backward": per_token(lambda t: count(sublayers[t].run_backward), channels, item_bytes),
        "recompute": difference(block(LONGEST_BLOCK), block(LONGEST_BLOCK - 1)),
    }
    sums = {key: sum(phase[key] for phase in phases.values()) for key in ("total", "streams")}
    return {
        "unit": "C: one row of channels per token",
        "channels": channels,
        "num_streams": spec.num_streams,
        "mixing": str(spec.mixing),
        "shifted_pre": spec.shifted_pre,
        "dtype": str(dtype).removeprefix("torch."),
        "token_counts": TOKEN_COUNTS,
        **{name: phase["total"] for name, phase in phases.items()},
        **sums,
        "kernels": [
            {"phase": name, "name": kernel} | row
            for name, phase in phases.items()
            for kernel, row in phase["kernels"].items()
        ],
        "torch_operations": {name: phase["torch_operations"] for name, phase in phases.items()},
        "phases": {name: {key: phase[key] for key in ("total", "streams")} for name, phase in phases.items()},
        "field": {
            name: dict(zip(("forward", "backward", "recompute", "total"), row, strict=True))
            for name, row in FIELD.items()
        },
    }


def print_table(report: dict[str, Any]) -> None:
    print(
        f"Counted bytes per token and sublayer in units of C (C = {report['channels']}, {report['dtype']})\n"
    )
    print(f"{'kernel':18}{'phase':11}{'loaded':>8}{'stored':>8}{'streams':>9}{'requested':>11}")
    for row in report["kernels"]:
        requested = row["requested_loaded"] + row["requested_stored"]
        print(
            f"{row['name']:18}{row['phase']:11}{row['loaded']:8.2f}{row['stored']:8.2f}{row['streams']:9.2f}"
            f"{requested:11.2f}"
        )
    for phase, operations in report["torch_operations"].items():
        for name, moved in operations.items():
            print(f"torch {name:23}{phase:11}{moved:8.2f}")
    print(f"\n{'':32}{'forward':>9}{'backward':>10}{'recompute':>11}{'total':>8}")
    phases = report["phases"]
    for label, key in (
        ("counted, everything", "total"),
        ("of it streams", "streams"),
    ):
        numbers = [phases[name][key] for name in ("forward", "backward", "recompute")]
        print(f"{label:32}{numbers[0]:9.2f}{numbers[1]:10.2f}{numbers[2]:11.2f}{sum(numbers):8.2f}")
    print("read from the source of others (streams only, without the RMSNorm that is part of ours):")
    for name, row in report["field"].items():
        cells = [row[key] for key in ("forward", "backward", "recompute", "total")]
        print(
            f"{name:32}"
            + "".join(
                f"{'-' if c is None else f'{c:.0f}':>{w}}" for c, w in zip(cells, (9, 10, 11, 8), strict=True)
            )
        )


def print_chunked(report: dict[str, Any]) -> None:
    print(f"Launched in chunks, C = {report['channels']}: {report['label']}.\nBytes per token in units of C:")
    for name in ("forward", "backward", "recompute", "total"):
        print(f"  {name:11}{report[name]:7.2f}")
    for device in report["devices"]:
        print(
            f"{device['architecture']}: {device['l2_bytes'] >> 20} MiB of cache, chunks of "
            f"{device['chunk_tokens']} tokens: {device['post_project_programs']} programs of post_project, "
            f"{device['backward_apply_programs']} of backward_apply"
        )


def report(arguments: argparse.Namespace) -> None:
    """Count and print what was asked for."""
    spec = ConnectionSpec(
        num_streams=arguments.streams,
        mixing=Mixing(arguments.mixing),
        sinkhorn_iterations=2,  # they happen in registers and move nothing; few keep the count short
        shifted_pre=arguments.shifted_pre,
    )
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    counted = measure_chunked if arguments.chunked else measure
    counts = counted(arguments.channels, spec, dtype) | {"provenance": provenance("mhc_kernels.traffic")}
    if arguments.json:
        print(json.dumps(counts, indent=2))
    elif arguments.chunked:
        print_chunked(counts)
    else:
        print_table(counts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=1280)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--mixing", choices=[str(mixing) for mixing in Mixing], default=str(Mixing.SINKHORN))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--shifted-pre", action="store_true", help="collapse with the carried H_pre")
    parser.add_argument("--chunked", action="store_true", help="count launches in chunks behind a cache")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        report(arguments)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at import; start over with the interpreter.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "mhc_kernels.traffic", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    main()
