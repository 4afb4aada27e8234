"""What every kernel needs on an absent device: `python -m mhc_kernels.resources --arch sm_90 [--json]`.

Each kernel is compiled offline exactly as launch/ launches it at the checked-in tile. Registers, stack and
shared memory come from the compiler, the rest from the disassembly:

spills        loads and stores of local memory (LDL, STL; scratch accesses on AMD) plus bytes of stack
atomics       instructions that modify global memory atomically (REDG, ATOMG and kin; global_atomic and kin).
              Shared-memory ATOMS, by which the compiler hands out tensor memory, are not among them.
vector_bytes  width of the accesses to streams: the narrowest global access that is not of 4 bytes (those are
              single coefficients; nor of 8, where a kernel reads indices). 16 is the hardware's 128 bits.
              `accesses` counts every width.
tensor_memory columns of Blackwell's tensor memory

What does not fit (spills, atomics, more memory than a program can have) is told on stderr, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped]

from mhc_kernels.offline import (
    RecordedLaunch,
    compile_for,
    require_compiler,
    seam_launches,
    token_launches,
)
from mhc_kernels.provenance import provenance
from mhc_kernels.spec import ConnectionSpec, Mixing
from mhc_kernels.tiles import ARCHITECTURES

FLOAT_BYTES, INDEX_BYTES = 4, 8
SHARED_LIMIT = {"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program can have, from the vendors' tables."""
TENSOR_MEMORY_LIMIT = 512
"""Columns of tensor memory. With more, the compiler makes a kernel that does nothing but trap."""
NVIDIA_ATOMIC = re.compile(r"\b(?:U?REDG?|U?ATOMG?|UBLKRED)\.")
"""Without a result (RED; from Hopper on REDG; of bulk copies UBLKRED) and with one (ATOM, ATOMG)."""
AMD_ATOMIC = re.compile(r"\b(?:global|buffer|flat)_atomic")
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class KernelResources:
    """One compiled kernel. `shared_bytes` per program; `accesses` counts global instructions by kind."""

    name: str
    channels: int
    tile: dict[str, int]
    registers: int
    shared_bytes: int
    spills: int
    atomics: int
    vector_bytes: int
    accesses: dict[str, int]
    tensor_memory: int = 0

    def misfits(self, architecture: str) -> list[str]:
        """Why this kernel cannot run on the architecture, or not as it should; empty for one that can."""
        shared, limit = self.shared_bytes, SHARED_LIMIT[architecture]
        reasons = {
            f"{self.spills} spilled accesses and bytes of stack": self.spills > 0,
            f"{self.atomics} global atomics, whose order is not fixed": self.atomics > 0,
            f"{shared} bytes of shared memory, a program can have {limit}": shared > limit,
            f"{self.tensor_memory} columns of tensor memory, a program can have {TENSOR_MEMORY_LIMIT}": (
                self.tensor_memory > TENSOR_MEMORY_LIMIT
            ),
            "no access to global memory: the compiler gave up on it": not self.accesses,
        }
        return [reason for reason, holds in reasons.items() if holds]


def nvidia_disassembly(cubin: bytes) -> str:
    return _tool("nvdisasm", cubin, "-c")


def _tool(name: str, cubin: bytes, *options: str) -> str:
    tool = NVIDIA_TOOLS / name
    if not tool.exists():
        raise ValueError(
            f"{name} is not part of this Triton: install the wheel nvidia-cuda-{name} next to it"
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def nvidia_resources(launched: RecordedLaunch, channels: int, compiled: Any) -> KernelResources:
    cubin = compiled.asm["cubin"]
    usage = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack = (int(_search(rf"{key}:(\d+)", usage)) for key in ("REG", "STACK"))
    sass = nvidia_disassembly(cubin)
    accesses = Counter(re.findall(r"\b((?:LDG|STG|LDGSTS)\.[A-Z0-9_.]+)", sass))
    return KernelResources(
        launched.name,
        channels,
        launched.tile,
        registers,
        int(compiled.metadata.shared),
        stack + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        len(NVIDIA_ATOMIC.findall(sass)),
        _stream_width(launched, map(_nvidia_width, accesses)),
        dict(sorted(accesses.items())),
        int(compiled.metadata.tmem_size),
    )


def _stream_width(launched: RecordedLaunch, widths: Iterable[int]) -> int:
    """The narrowest that is not the width of a single coefficient or index."""
    tensors = [value for value in launched.arguments.values() if isinstance(value, torch.Tensor)]
    single = {FLOAT_BYTES} | {INDEX_BYTES for tensor in tensors if tensor.dtype == torch.int64}
    found = set(widths)
    return min(found - single, default=max(found, default=0))


def _nvidia_width(instruction: str) -> int:
    for bits in (128, 64):
        if f".{bits}" in instruction:
            return bits // 8
    if re.search(r"\.[US]?16", instruction):
        return 2
    return 1 if re.search(r"\.[US]8", instruction) else 4


def amd_resources(launched: RecordedLaunch, channels: int, compiled: Any) -> KernelResources:
    assembly = compiled.asm["amdgcn"]
    accesses = Counter(re.findall(r"\b((?:global|buffer)_(?:load|store)_[a-z0-9_]+)", assembly))
    widths = {
        "dwordx4": 16,
        "b128": 16,
        "dwordx3": 12,
        "dwordx2": 8,
        "b64": 8,
        "short": 2,
        "ushort": 2,
        "byte": 1,
    }

    def width(instruction: str) -> int:
        return next((size for suffix, size in widths.items() if suffix in instruction), 4)

    spilled = int(_search(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    spilled += int(_search(r"\.sgpr_spill_count:\s*(\d+)", assembly))
    return KernelResources(
        launched.name,
        channels,
        launched.tile,
        int(_search(r"\.vgpr_count:\s*(\d+)", assembly)),
        int(compiled.metadata.shared),
        spilled + len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        len(AMD_ATOMIC.findall(assembly)),
        _stream_width(launched, map(width, accesses)),
        dict(sorted(accesses.items())),
    )


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}: its format changed")
    return found.group(1)


def kernel_resources(
    architecture: str, channels: int, spec: ConnectionSpec, dtype: torch.dtype, only: str | None = None
) -> list[KernelResources]:
    """Compile every kernel of a chunk and of its experts, or `only` the one of that name, and measure it."""
    require_compiler()
    read = amd_resources if architecture.startswith("gfx") else nvidia_resources
    launches = seam_launches(architecture, channels, spec, dtype)
    launches += token_launches(architecture, channels, dtype)
    names = list(dict.fromkeys(launched.name for launched in launches))
    if only is not None and only not in names:
        raise ValueError(f"kernel {only!r} is not launched here: use one of {', '.join(names)}")
    return [
        read(launched, channels, compile_for(launched, architecture))
        for launched in launches
        if only is None or launched.name == only
    ]


def report(arguments: argparse.Namespace) -> bool:
    """Print what was asked for; whether every kernel fits."""
    spec = ConnectionSpec(num_streams=arguments.streams, mixing=Mixing(arguments.mixing))
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    if not arguments.json:
        print(f"{'kernel':24}{'C':>6}{'regs':>6}{'shared':>8}{'spills':>8}{'atomics':>9}{'bytes':>7}  tile")
    kernels: list[KernelResources] = []
    fits = True
    for channels in arguments.channels:
        for one in kernel_resources(arguments.arch, channels, spec, dtype, arguments.kernel):
            kernels.append(one)
            for reason in one.misfits(arguments.arch):
                fits = False
                print(f"{one.name} at C = {channels} does not fit: {reason}", file=sys.stderr)
            if not arguments.json:
                print(
                    f"{one.name:24}{one.channels:6}{one.registers:6}{one.shared_bytes:8}{one.spills:8}"
                    f"{one.atomics:9}{one.vector_bytes:7}  {one.tile}",
                    flush=True,
                )
    if arguments.json:
        content = {
            "architecture": arguments.arch,
            "streams": arguments.streams,
            "dtype": arguments.dtype,
            "provenance": provenance("mhc_kernels.resources"),
            "kernels": [asdict(kernel) for kernel in kernels],
        }
        print(json.dumps(content, indent=2))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHITECTURES, required=True)
    parser.add_argument("--channels", type=int, nargs="+", default=[1280, 2560, 4096, 7168])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--mixing", choices=[str(mixing) for mixing in Mixing], default=str(Mixing.SINKHORN))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        sys.exit(0 if report(arguments) else 1)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
