"""How many numbers a hyper-connection computes per token and sublayer. Arithmetic on the config, no torch."""

from __future__ import annotations

import math

from mhc_dist.config_sections import ResidualConfig, ResidualKind


def num_projected(residual: ResidualConfig) -> int:
    """Coefficients that come out of the projection: [pre n | post n | what H_res is made of].

    The plain residual has none; `hc` computes them per stream, yet as many.
    """
    n = residual.num_streams
    match residual.kind:
        case ResidualKind.RESIDUAL:
            return 0
        case ResidualKind.HC | ResidualKind.MHC:
            return 2 * n + n * n
        case ResidualKind.IDENTITY:
            return 2 * n
        case ResidualKind.MHC_LITE:  # one for each permutation
            return 2 * n + math.factorial(n)
        case ResidualKind.KROM:  # one for each 2x2 factor
            return 2 * n + n.bit_length() - 1


def num_mixed(residual: ResidualConfig) -> int:
    """H_pre, H_post and H_res as they are applied: n, n, and n^2 where streams are mixed."""
    n = residual.num_streams
    match residual.kind:
        case ResidualKind.RESIDUAL:
            return 0
        case ResidualKind.IDENTITY:
            return 2 * n
        case _:
            return 2 * n + n * n
