"""Record what is launched, without a device, and compile it for a named architecture.

The recorded arguments are the ones a GPU would get, so the report is about the kernels that run, not about
look-alikes: constexprs, pointer types, alignment and warps all come from the launch itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

from mhc_kernels import tokens
from mhc_kernels.check import check_streams
from mhc_kernels.device.streams import post_kernel
from mhc_kernels.launch.architecture import cpu_architecture
from mhc_kernels.launch.backward import seam_backward
from mhc_kernels.launch.ends import collapse_backward, collapse_forward, update_backward, update_forward
from mhc_kernels.launch.forward import seam_forward
from mhc_kernels.launch.recompute import recompute_block
from mhc_kernels.seam_function import SeamGradients, Update
from mhc_kernels.spec import Connection, ConnectionSpec, Kept, Mixing
from mhc_kernels.tiles import CHUNK_MULTIPLE

POINTER_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas")
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class RecordedLaunch:
    """One `kernel[grid](...)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The documentation's name of the kernel: two of them share code with a neighbour, and launches in
        chunks compile three of them differently."""
        chunked = self.arguments.get("REMIX") or self.arguments.get("ACCUMULATE")
        return self._plain_name + ("_chunked" if chunked else "")

    @property
    def _plain_name(self) -> str:
        name = str(self.kernel.__name__).removesuffix("_kernel")
        if name == "post_project" and not self.arguments["HAS_UPDATE"]:
            return "project"
        if name == "backward_apply" and not self.arguments["HAS_NEXT"]:
            return "post_backward"
        if name in ("backward_apply", "backward_streams") and not self.arguments["HAS_UPDATE"]:
            return "project_backward"
        return name

    @property
    def tile(self) -> dict[str, int]:
        keys = ("BT", "BC", "BLOCK_C", "BLOCK", "L")
        tile = {key: int(self.arguments[key]) for key in keys if key in self.arguments}
        return tile | {"num_warps": int(self.options["num_warps"])}


@contextmanager
def recorded_launches(architecture: str) -> Iterator[list[RecordedLaunch]]:
    """Inside, kernels are noted instead of run, with the tiles of `architecture`."""
    recorded: list[RecordedLaunch] = []

    def note(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in LAUNCH_OPTIONS if key in kwargs}
        arguments = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
        recorded.append(RecordedLaunch(self, grid, arguments, options))

    original = JITFunction.run
    token = cpu_architecture.set(architecture)
    JITFunction.run = note
    try:
        yield recorded
    finally:
        JITFunction.run = original
        cpu_architecture.reset(token)


def compile_for(recorded: RecordedLaunch, architecture: str) -> Any:
    """The compiled kernel (`asm`, `metadata`) for an architecture that need not be present."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    fixed = set(recorded.kernel.do_not_specialize)
    for position, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constexprs[(position,)] = value
        else:
            signature[parameter.name] = _describe(
                value, (position,), constexprs, attributes, parameter.name not in fixed
            )
    source = ASTSource(recorded.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=TARGETS[architecture], options=recorded.options)


def _describe(
    value: Any,
    path: tuple[int, ...],
    constexprs: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], list[list[object]]],
    specialise: bool,
) -> Any:
    """Triton's type of one run-time argument; alignment and constants are noted as its launcher would."""
    match value:
        case tuple():
            return tuple(
                _describe(v, (*path, k), constexprs, attributes, specialise) for k, v in enumerate(value)
            )
        case None:
            constexprs[path] = None
            return "constexpr"
        case Tensor():
            attributes[path] = [["tt.divisibility", 16]]
            return POINTER_TYPES[value.dtype]
        case int() if specialise and value == 1:
            constexprs[path] = 1
            return "constexpr"
        case int():
            if specialise and value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32"
        case float():
            return "fp32"
    raise ValueError(f"a kernel argument of type {type(value).__name__} cannot be described")


def seam_launches(
    architecture: str,
    channels: int,
    spec: ConnectionSpec,
    dtype: torch.dtype = torch.bfloat16,
    num_tokens: int = 4096,
    block: int = 3,
) -> list[RecordedLaunch]:
    """Every kernel of a chunk of layers: open, cross, close, their backwards, the head's reduction, a
    recompute; and what launches in chunks of tokens need besides (their forward is the same)."""
    x, y, post, res, connection = seam_tensors(num_tokens, channels, spec, dtype)
    check_streams(x)
    carried = post if spec.shifted_pre else None
    update = Update(y, post, res)
    with recorded_launches(architecture) as recorded:
        for tail in (None, update):
            forward = seam_forward(x, tail, connection, carried)
            gradients = SeamGradients(x, y, carried, post, forward.res_TNN)
            for chunk_tokens in (0, CHUNK_MULTIPLE):
                seam_backward(x, tail, connection, carried, forward.saved, gradients, chunk_tokens)
        update_forward(x, update)
        update_backward(x, update, x)
        collapse_forward(x, post)
        collapse_backward(x, post, y)
        kept = Kept(post, forward.rstd_T, connection.gain_C, post, res, y)
        recompute_block(x, [kept] * block)
    return list({(launched.name, str(launched.tile)): launched for launched in recorded}.values())


def token_launches(architecture: str, channels: int, dtype: torch.dtype) -> list[RecordedLaunch]:
    """The token kernels of a mixture of experts."""
    num_tokens, chosen = 64, 8
    rows = torch.empty(num_tokens * chosen, channels, dtype=dtype)
    gate_up = torch.empty(num_tokens, 2 * channels, dtype=dtype)
    weight, place = torch.empty(num_tokens, chosen), torch.zeros(num_tokens, chosen, dtype=torch.int64)
    with recorded_launches(architecture) as recorded:
        out = tokens.launch_unpermute(rows, weight, place)
        tokens.launch_unpermute_backward(rows, weight, place, out)
        tokens.launch_swiglu_backward(gate_up, tokens.launch_swiglu(gate_up))
    return recorded


def seam_tensors(
    num_tokens: int, channels: int, spec: ConnectionSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Connection]:
    """Uninitialised streams, y, post, res and a connection."""
    n, m = spec.num_streams, spec.num_coefficients
    res = None if spec.mixing is Mixing.IDENTITY else torch.empty(num_tokens, n, n)
    connection = Connection(
        torch.empty(m, n * channels), torch.empty(3), torch.empty(m), torch.empty(channels), spec
    )
    streams = torch.empty(num_tokens, n, channels, dtype=dtype)
    return (
        streams,
        torch.empty(num_tokens, channels, dtype=dtype),
        torch.empty(num_tokens, n),
        res,
        connection,
    )


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets kernels in this process; decided when it was imported."""
    return not isinstance(post_kernel, JITFunction)


def require_compiler() -> None:
    if interpreting():
        raise ValueError("TRITON_INTERPRET is set, but offline compilation needs the compiler: unset it")
