"""What is checked, where and at which sizes; and what a check returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mhc_kernels.seam import ConnectionSpec, Mixing


class Case(NamedTuple):
    """One connection at one width."""

    spec: ConnectionSpec
    channels: int

    @property
    def name(self) -> str:
        shifted = " shifted_pre" if self.spec.shifted_pre else ""
        eps = " eps" if self.spec.pre_eps else ""
        return f"n={self.spec.num_streams} {self.spec.mixing}{shifted}{eps} C={self.channels}"


CASES = (
    Case(ConnectionSpec(num_streams=4), 1280),
    Case(ConnectionSpec(num_streams=4, sinkhorn_eps=1e-6, pre_eps=1e-6), 2560),
    Case(ConnectionSpec(num_streams=4), 7168),
    Case(ConnectionSpec(num_streams=4), 16),
    Case(ConnectionSpec(num_streams=2), 192),
    Case(ConnectionSpec(num_streams=8), 512),
    Case(ConnectionSpec(num_streams=4, mixing=Mixing.IDENTITY), 1280),
    Case(ConnectionSpec(num_streams=4, mixing=Mixing.PERMUTATIONS), 1280),
    Case(ConnectionSpec(num_streams=4, shifted_pre=True), 1280),
)


class Plan(NamedTuple):
    """The sizes of a real run; `REHEARSAL` is what the interpreter can do in seconds."""

    device: str = "cuda"
    cases: tuple[Case, ...] = CASES
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    num_tokens: int = 130
    chunked_cases: tuple[Case, ...] = CASES[:1]
    far: tuple[int, int, int] = (65536 + 128, 4, 8192)
    """T, n, C of streams whose last elements lie beyond 2^31."""
    experts: tuple[int, int] = (300, 512)
    """Tokens and channels of the mixture of experts."""
    timed_channels: tuple[int, ...] = (1280, 2560, 4096)
    timed_tokens: int = 4096


TWO = Case(ConnectionSpec(num_streams=2, sinkhorn_iterations=2), 32)
REHEARSAL = Plan("cpu", (TWO,), Plan().dtypes, 17, (), (128, 2, 32), (20, 48), (32,), 17)
"""Without chunks: the shortest that a cache makes worth while is too long for the interpreter."""


class Outcome(NamedTuple):
    """`passed` is None where the device cannot run the check; `reason` says why not, or what failed."""

    passed: bool | None
    figures: dict[str, Any]
    reason: str = ""


Check = Callable[[Plan], Outcome]

NEEDS_GPU = Outcome(None, {}, "needs a GPU")
