"""What one sublayer connection is, and what passes through a seam. No arithmetic here.

No torch either: tensors are named in types alone, so that who plans a run can say what its connections are.

Shape letters: T tokens, N streams, C model width, D = N*C, M mixing coefficients per token.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

SUPPORTED_STREAMS = (2, 4, 8)


class Mixing(StrEnum):
    """How the streams are mixed by H_res."""

    SINKHORN = "sinkhorn"
    """mHC: exp(logits) scaled to a doubly stochastic matrix by Sinkhorn-Knopp (paper Eq. 9)."""
    IDENTITY = "identity"
    """H_res = I; only H_pre and H_post are learned."""
    PERMUTATIONS = "permutations"
    """mHC-lite: a softmax mixture of all n! permutation matrices, doubly stochastic without iterations."""
    KRONECKER = "kronecker"
    """The Kronecker product of log2(n) doubly stochastic 2x2 matrices: few coefficients at n = 8."""


@dataclass(frozen=True)
class ConnectionSpec:
    """The constants of a connection; equal for all sublayers of a model.

    `sinkhorn_eps` and `pre_eps` are 0 in the paper and 1e-6 in DeepSeek-V4.
    `projection_norm_eps` belongs to the RMS over all n*C elements, `sublayer_norm_eps` to the RMSNorm over C.
    `shifted_pre` collapses with the H_pre that the previous sublayer's seam produced (one pass).
    """

    num_streams: int
    mixing: Mixing = Mixing.SINKHORN
    sinkhorn_iterations: int = 20
    sinkhorn_eps: float = 0.0
    pre_eps: float = 0.0
    projection_norm_eps: float = 1e-20
    sublayer_norm_eps: float = 1e-20
    shifted_pre: bool = False
    encoded: str = dataclasses.field(init=False, repr=False, compare=False)
    """The fields above as text, for operations that take tensors and plain values only. Written once, because
    a compiler that traces through a seam can read a string but cannot make this one."""

    def __post_init__(self) -> None:
        if self.num_streams not in SUPPORTED_STREAMS:
            raise ValueError(
                f"num_streams={self.num_streams} is not supported: use one of {SUPPORTED_STREAMS}"
            )
        if self.mixing is Mixing.PERMUTATIONS and self.num_streams > 4:
            raise ValueError(
                f"mixing=permutations with num_streams={self.num_streams} needs "
                f"{math.factorial(self.num_streams)} coefficients per token: use mixing=sinkhorn or n <= 4"
            )
        if self.sinkhorn_iterations < 1:
            raise ValueError(
                f"sinkhorn_iterations={self.sinkhorn_iterations}: at least 1 is needed (paper: 20)"
            )
        for name in ("sinkhorn_eps", "pre_eps", "projection_norm_eps", "sublayer_norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name}={value}: a finite number >= 0 is needed")

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        object.__setattr__(self, "encoded", json.dumps(given))

    @classmethod
    def decoded(cls, encoded: str) -> ConnectionSpec:
        """The inverse of `encoded`."""
        given = json.loads(encoded)
        return cls(**given | {"mixing": Mixing(given["mixing"])})

    @property
    def num_res_coefficients(self) -> int:
        match self.mixing:
            case Mixing.SINKHORN:
                return self.num_streams**2
            case Mixing.IDENTITY:
                return 0
            case Mixing.PERMUTATIONS:
                return math.factorial(self.num_streams)
            case Mixing.KRONECKER:
                return self.num_streams.bit_length() - 1

    @property
    def num_coefficients(self) -> int:
        """M: coefficients per token, in the order [pre n | post n | res]."""
        return 2 * self.num_streams + self.num_res_coefficients


class Connection(NamedTuple):
    """The parameters of one sublayer's connection.

    phi_MD  (M, n*C) fp32   projection of the flattened streams, D index = stream * C + channel
    alpha_3 (3,)     fp32   scales of the pre, post and res logits
    bias_M  (M,)     fp32
    gain_C  (C,)     fp32 or the streams' dtype: gain of the sublayer's own RMSNorm
    """

    phi_MD: Tensor
    alpha_3: Tensor
    bias_M: Tensor
    gain_C: Tensor
    spec: ConnectionSpec


class Seam(NamedTuple):
    """What a seam hands on: the streams, the next sublayer's input and its coefficients.

    streams_TNC (T, n, C)  streams the next sublayer reads
    h_TC        (T, C)     RMSNorm(sum_i pre[i] streams[i]) * gain: input of the sublayer's function
    post_TN     (T, n)     fp32, differentiable
    res_TNN     (T, n, n)  fp32, [out, in], differentiable; None for mixing=identity
    pre_TN      (T, n)     fp32; differentiable only with `shifted_pre`, where the next seam takes it
    rstd_T      (T,)       fp32, no gradient: 1/rms of the collapsed streams, kept for `recompute_block`
    """

    streams_TNC: Tensor
    h_TC: Tensor
    post_TN: Tensor
    res_TNN: Tensor | None
    pre_TN: Tensor
    rstd_T: Tensor


class Kept(NamedTuple):
    """What is kept of one sublayer so that its streams and input can be regenerated bit for bit.

    `pre_TN` is the H_pre that collapsed the streams (with `shifted_pre`: the carried one). `y_TC` is
    the output of the sublayer's function; the last sublayer of a block needs none (None).
    """

    pre_TN: Tensor
    rstd_T: Tensor
    gain_C: Tensor
    post_TN: Tensor
    res_TNN: Tensor | None
    y_TC: Tensor | None


class Regenerated(NamedTuple):
    """Streams before a sublayer and the input of its function, as the forward computed them."""

    streams_TNC: Tensor
    h_TC: Tensor


class SeamBackend(Protocol):
    """One implementation of the seam. All of them compute the same function; see `seam.make_backend`."""

    name: str

    def open(self, streams_TNC: Tensor, connection: Connection, pre_TN: Tensor | None = None) -> Seam:
        """First sublayer of a chunk: coefficients, collapse, RMSNorm. The streams are returned as given.

        pre_TN: with `shifted_pre`, the H_pre carried from the previous chunk; None at the model's start,
        where the sublayer's own H_pre is used.
        """
        ...

    def cross(
        self,
        streams_TNC: Tensor,
        y_TC: Tensor,
        post_TN: Tensor,
        res_TNN: Tensor | None,
        connection: Connection,
        pre_TN: Tensor | None = None,
    ) -> Seam:
        """Finish sublayer l (streams, y, post, res are l's) and prepare l+1 (`connection` is l+1's)."""
        ...

    def close(self, streams_TNC: Tensor, y_TC: Tensor, post_TN: Tensor, res_TNN: Tensor | None) -> Tensor:
        """End of a chunk: x'[o] = sum_i res[o, i] x[i] + post[o] y, (T, n, C)."""
        ...

    def collapse(self, streams_TNC: Tensor, pre_TN: Tensor) -> Tensor:
        """sum_i pre[i] x[i], (T, C): the reduction before the output head."""
        ...

    def recompute_block(self, streams_TNC: Tensor, kept: Sequence[Kept]) -> list[Regenerated]:
        """Streams and inputs of consecutive sublayers again, bit-equal to the forward, without graph."""
        ...
