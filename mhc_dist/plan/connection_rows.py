"""Rows C per token that the connections between sublayers move. No torch.

C is one row of width C in the activation format. What the kernels move is `mhc_kernels.formula`, which equals
their counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_kernels import formula
from mhc_kernels.launch.sizes import parameter_splits
from mhc_kernels.tiles import tiles_for

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.model.seam_spec import seam_spec

TILES = "sm_90"
"""Whose tiles the kernels take. Blackwell's move the same bytes: they differ in how far loads run ahead."""


@dataclass(frozen=True, slots=True)
class ConnectionWork:
    """Rows C per token that one sublayer's connection moves, and operations of its projection.

    recompute: rows moved to bring back what a recomputing block dropped.
    """

    enter: float
    cross: float
    leave: float
    enter_backward: float
    cross_backward: float
    leave_backward: float
    recompute: float
    projection: float


PLAIN = ConnectionWork(
    enter=2, cross=4, leave=3, enter_backward=4, cross_backward=4, leave_backward=0, recompute=0, projection=0
)
"""The plain residual at its best: one pass that adds and normalises. Backward it reads both gradients and the
sum, and writes one gradient for the two that were added; a chunk's last sum hands its gradient on as it is.
"""


def connection_work(config: RunConfig) -> ConnectionWork:
    """Seam-fused kernels, two passes over the streams; one launch a microbatch.

    `cross` is a whole seam. `enter` and `leave` are its halves at the ends of a chunk: `leave` finishes a
    sublayer (x, y in, x' out; back: g, x, y in, dx, dy out), `enter` prepares the next one without y.
    Coefficients and partial sums count where they are made, with `enter`.
    """
    n = config.residual.num_streams
    if config.residual.kind is ResidualKind.RESIDUAL:
        return PLAIN
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
    return ConnectionWork(
        enter=cross - (n + 1),
        cross=cross,
        leave=2 * n + 1,
        enter_backward=cross_backward - 2,
        cross_backward=cross_backward,
        leave_backward=3 * n + 2,
        recompute=rows(formula.recompute(width, spec, value_bytes)),
        projection=2.0 * n * width * spec.num_coefficients,
    )


def unfused_connection_work(config: RunConfig) -> ConnectionWork:
    """The same operation by operation: 5n+1 rows read and 3n+1 written forward (mHC paper, table 2). The
    backward is taken as twice that, as for other element-wise steps; recompute repeats the sum over streams
    and the norm.
    """
    n = config.residual.num_streams
    fused = connection_work(config)
    if config.residual.kind is ResidualKind.RESIDUAL:
        return fused
    forward = (5 * n + 1) + (3 * n + 1)
    return replace(
        fused,
        enter=forward / 2,
        cross=forward,
        leave=forward / 2,
        enter_backward=forward,
        cross_backward=2 * forward,
        leave_backward=forward,
        recompute=3 * n + 2,
    )
