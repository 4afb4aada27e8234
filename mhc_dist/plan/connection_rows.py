"""Rows C per token that the connections between sublayers move. No torch.

C is one row of width C in the activation format. The kernels' bytes are counted elsewhere, and
`mhc_kernels.formula` equals them; it needs torch, so its sums are repeated here and a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mhc_kernels.tiles import TileSet, tiles_for

from mhc_dist.config import RunConfig
from mhc_dist.config_sections import ResidualKind
from mhc_dist.model.coefficients import num_mixed, num_projected

FLOAT_BYTES = 4
"""Of coefficients and partial sums, whatever the format of the streams."""

PROGRAMS_WANTED, SMALLEST_TOKEN_SPLIT = 528, 256
"""How tokens are split over programs that sum gradients of the projection (`mhc_kernels.launch.sizes`)."""


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
    """Seam-fused kernels, two passes over the streams: 3n+2 rows of streams forward, 4n+4 backward (5n+4 at
    n = 8), n+2 recomputed; beside them coefficients and partial sums. `enter` and `leave` are the half seams
    at the ends of a chunk, whose coefficients are counted where they are made.
    """
    n = config.residual.num_streams
    if config.residual.kind is ResidualKind.RESIDUAL:
        return PLAIN
    width = config.model.hidden_size
    tiles = tiles_for("sm_90", n, width)
    row_floats = width * (2 if config.train.precision == "bf16" else 4) / FLOAT_BYTES
    num_tokens = config.data.sequence_length * config.data.sequences_per_microbatch
    m, res = num_projected(config.residual), num_mixed(config.residual) - 2 * n
    more_streams = n if tiles.backward_phi is not None else 0
    forward = _forward_floats(n, m, res, width, tiles, num_tokens) / row_floats
    backward = _backward_floats(n, m, res, width, tiles, num_tokens) / row_floats
    return ConnectionWork(
        enter=2 * n + 1 + forward,
        cross=3 * n + 2 + forward,
        leave=2 * n + 1,
        enter_backward=4 * n + 2 + more_streams + backward,
        cross_backward=4 * n + 4 + more_streams + backward,
        leave_backward=3 * n + 2,
        recompute=n + 2 + (2 * n + res + 1) / row_floats,
        projection=2.0 * n * width * m,
    )


def _forward_floats(n: int, m: int, res: int, width: int, tiles: TileSet, num_tokens: int) -> float:
    """Coefficients, partial projections; of each launch, the projection's weights."""
    coefficients = 3 * n + 2 * res + m + 2
    return coefficients + 2 * tiles.project_splits * (m + 1) + m * n * width / num_tokens


def _backward_floats(n: int, m: int, res: int, width: int, tiles: TileSet, num_tokens: int) -> float:
    """Coefficients and their gradients, partial sums over channels; of each launch, the projection's weights,
    and their gradient as partial sums over tokens.
    """
    blocks = _ceil(width, tiles.backward_apply.channels)
    coefficients = 5 * n + 3 * res + 3 * m + 7
    partials = 2 * blocks * (n + res) + 4 * m / tiles.backward_dots.tokens
    phi_blocks = blocks
    if tiles.backward_phi is not None:
        coefficients += m
        phi_blocks = _ceil(n * width, tiles.backward_phi.channels)
    splits = max(1, min(num_tokens // SMALLEST_TOKEN_SPLIT, _ceil(PROGRAMS_WANTED, phi_blocks)))
    return coefficients + partials + (2 + 2 * splits) * m * n * width / num_tokens


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


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
