"""Bytes of a sublayer in closed form. The tests require the counted bytes to equal these, byte for byte.

Standard library only: who plans a run takes its bytes from here.
"""

from __future__ import annotations

from typing import NamedTuple

from mhc_kernels.launch.sizes import TokenSplits, ceil_divided, split_channels
from mhc_kernels.spec import ConnectionSpec, Mixing
from mhc_kernels.tiles import TileSet

FLOAT_BYTES = 4


class Bytes(NamedTuple):
    """`streams`, `coefficients`, `partials` per token; `constants` per launch, whatever the token count."""

    streams: float
    coefficients: float
    partials: float
    constants: float

    @property
    def per_token(self) -> float:
        return self.streams + self.coefficients + self.partials


def _res_floats(spec: ConnectionSpec) -> int:
    return 0 if spec.mixing is Mixing.IDENTITY else spec.num_streams**2


def forward(channels: int, spec: ConnectionSpec, tiles: TileSet, item_bytes: int) -> Bytes:
    """post_project: x, y in, x' out. mix_pre: x' in, h out."""
    n, m, res = spec.num_streams, spec.num_coefficients, _res_floats(spec)
    splits = ceil_divided(channels, split_channels(channels, tiles))
    coefficients = (n + res) + (2 * n + res) + m + 2
    return Bytes(
        (3 * n + 2) * channels * item_bytes,
        coefficients * FLOAT_BYTES,
        2 * splits * (m + 1) * FLOAT_BYTES,
        (m * n * channels + channels + m + 3) * FLOAT_BYTES,
    )


def backward(
    channels: int, spec: ConnectionSpec, tiles: TileSet, item_bytes: int, splits: TokenSplits
) -> Bytes:
    """backward_dots: x', dh in. backward_apply: g, dh, x, y in, dx, dy out. backward_phi, where there is one:
    x' in. reduce_partials: sums; of alpha's and the bias' in one step, as for up to 128 programs."""
    n, m, res = spec.num_streams, spec.num_coefficients, _res_floats(spec)
    blocks = ceil_divided(channels, tiles.backward_apply.channels)
    dots = (n + 2 + m + n + res) + (m + 2)
    apply = (n + res) + n + 3 + m
    partials = 2 * blocks * (n + res) + 4 * m / tiles.backward_dots.tokens
    phi_rows, phi_coefficients = (0, 0) if tiles.backward_phi is None else (n, m)
    phi = m * n * channels
    sums = 2 * (splits.phi * phi + splits.gain * channels) + (phi + channels)
    return Bytes(
        (4 * n + 4 + phi_rows) * channels * item_bytes,
        (dots + apply + phi_coefficients + (n + res)) * FLOAT_BYTES,
        partials * FLOAT_BYTES,
        (phi + sums) * FLOAT_BYTES,
    )


def recompute(channels: int, spec: ConnectionSpec, item_bytes: int) -> Bytes:
    """One sublayer more in a block: y in, x' and h out."""
    n = spec.num_streams
    coefficients = 2 * n + _res_floats(spec) + 1
    return Bytes((n + 2) * channels * item_bytes, coefficients * FLOAT_BYTES, 0.0, channels * FLOAT_BYTES)
