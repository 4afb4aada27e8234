"""Rows C per token that the connections between sublayers move. No torch.

C is one row of width C in the activation format. What the kernels move is `mhc_kernels.formula`, which equals
their counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from mhc_kernels import formula
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.tiles import tiles_for

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.model.coefficients import num_mixed, num_projected
from mhc_dist.model.seam_spec import seam_spec

TILES = "sm_90"
"""Whose tiles the kernels take. Blackwell's move the same bytes: they differ in how far loads run ahead."""


@dataclass(frozen=True, slots=True)
class ConnectionWork:
    """Rows C per token that one sublayer's connection moves, and operations of its projection.

    recompute: rows moved to bring back what a recomputing block dropped, in a launch for each phase; its
    first sublayer takes recompute_first, where it finishes the sublayer before, or recompute_opened.
    expand, collapse: rows at the model's ends, from one embedded row to all streams, and from those to the
    head's normalised input. fused: whether kernels do it, which multiply with tensor cores.
    """

    enter: float
    cross: float
    leave: float
    enter_backward: float
    cross_backward: float
    leave_backward: float
    recompute: float
    recompute_first: float
    recompute_opened: float
    projection: float
    expand: float
    expand_backward: float
    collapse: float
    collapse_backward: float
    fused: bool = True


PLAIN = ConnectionWork(
    enter=2,
    cross=4,
    leave=3,
    enter_backward=4,
    cross_backward=4,
    leave_backward=0,
    recompute=0,
    recompute_first=0,
    recompute_opened=0,
    projection=0,
    expand=2,
    expand_backward=2,
    collapse=2,
    collapse_backward=3,
)
"""The plain residual at its best: one pass that adds and normalises. Backward it reads both gradients and the
sum, and writes one gradient for the two that were added; a chunk's last sum hands its gradient on as it is.
At the ends, an embedded row is looked up, and the last one normalised.
"""


def has_kernels(config: RunConfig) -> bool:
    """Whether a run's connections are fused kernels. `hc` is plain autograd; `krom` mixes by coefficients
    that no kernel makes, so torch's operations run it, with a pass over the streams for each.
    """
    without = (ResidualKind.HC, ResidualKind.KROM)
    return config.residual.kind not in without and config.kernels.backend in ("triton", "cpu")


def connection_work(config: RunConfig) -> ConnectionWork:
    """Seam-fused kernels, two passes over the streams; one launch a microbatch. Where there are none
    (`has_kernels`) operation by operation. Backend `cpu` moves what kernels do: its blocks stay in the cache.

    `cross` is a whole seam. `enter` and `leave` are its halves at the ends of a chunk: `leave` finishes a
    sublayer (x, y in, x' out; back: g, x, y in, dx, dy out), `enter` prepares the next one without y.
    Coefficients and partial sums count where they are made, with `enter`.
    """
    n = config.residual.num_streams
    if config.residual.kind is ResidualKind.RESIDUAL:
        return PLAIN
    if not has_kernels(config):
        return unfused_connection_work(config)
    width = config.model.hidden_size
    value_bytes = 2 if config.train.precision == "bf16" else 4
    num_tokens = config.data.sequence_length * config.data.sequences_per_microbatch
    spec = seam_spec(config.model, config.residual)
    tiles = tiles_for(TILES, n, width, value_bytes)
    splits = parameter_splits(num_tokens, n, width, tiles)

    def rows(moved: formula.Bytes) -> float:
        return (moved.per_token + moved.constants / num_tokens) / (width * value_bytes)

    cross = rows(formula.forward(width, spec, tiles, value_bytes))
    cross_backward = rows(formula.backward(width, spec, tiles, value_bytes, splits))
    recompute = rows(formula.recompute(width, spec, value_bytes))
    update = (num_mixed(config.residual) - n) * formula.FLOAT_BYTES / (width * value_bytes)
    return ConnectionWork(
        enter=cross - (n + 1),
        cross=cross,
        leave=2 * n + 1,
        enter_backward=cross_backward - 2,
        cross_backward=cross_backward,
        leave_backward=3 * n + 2,
        recompute=recompute,
        # The streams are finished on their own (x, y, post, res in, x' out), then read for the input.
        recompute_first=recompute + 2 * n + update,
        recompute_opened=recompute - 1,
        projection=2.0 * n * width * spec.num_coefficients,
        **_ends(config),
    )


class _Ends(TypedDict):
    expand: float
    expand_backward: float
    collapse: float
    collapse_backward: float


def _ends(config: RunConfig) -> _Ends:
    """Rows at the model's ends. The head makes one row of its streams operation by operation, in fp32
    (`StreamHead`); the norm after it counts as those of sublayers do, as one pass.
    """
    residual, n = config.residual, config.residual.num_streams
    # Rows of fp32 in rows of the run's format, and a copy from one to the other and back.
    wide, cast = (2, 3) if config.train.precision == "bf16" else (1, 0)
    if residual.reduce == "learned" and n > 1:
        # Squares, their mean, the projection, weighted streams, their sum; and the gradients of all of these.
        collapse = cast * n + wide * (7 * n + 1) + cast
        collapse_backward = cast * n + wide * (20 * n + 2) + cast
    else:
        collapse = cast * n + wide * (n + 1) + cast
        collapse_backward = cast * n + wide * (n + 1) + cast
    return {
        "expand": 1 + n,
        "expand_backward": n + 1,
        "collapse": collapse + 2,
        "collapse_backward": collapse_backward + 3,
    }


def unfused_connection_work(config: RunConfig) -> ConnectionWork:
    """The same operation by operation: 5n+1 rows read and 3n+1 written forward (mHC paper, table 2), and the
    norm's two, which the fused kernels contain. The backward is taken as twice that. Products are in fp32.
    Recompute finishes a sublayer and repeats the sum over streams and the norm.
    """
    residual, n = config.residual, config.residual.num_streams
    if residual.kind is ResidualKind.RESIDUAL:
        return PLAIN
    forward = (5 * n + 1) + (3 * n + 1) + 2
    # `hc` projects every stream by itself onto n + 2 numbers, the others all streams at once.
    projected = n + 2 if residual.kind is ResidualKind.HC else num_projected(residual)
    return ConnectionWork(
        enter=forward / 2,
        cross=forward,
        leave=forward / 2,
        enter_backward=forward,
        cross_backward=2 * forward,
        leave_backward=forward,
        recompute=3 * n + 2,
        recompute_first=3 * n + 2,
        recompute_opened=n + 1,
        projection=2.0 * n * config.model.hidden_size * projected,
        fused=False,
        **_ends(config),
    )
