"""What the kernels are told about the mixing: its code, and the table of permutations."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels.reference import permutation_table
from mhc_kernels.spec import ConnectionSpec, Mixing
from mhc_kernels.tiles import power_of_two_at_least

MIXING_CODE = {Mixing.SINKHORN: 0, Mixing.IDENTITY: 1, Mixing.PERMUTATIONS: 2}


def mixing_code(spec: ConnectionSpec) -> int:
    """Raises ValueError for a mixing that the kernels do not have."""
    if spec.mixing not in MIXING_CODE:
        raise ValueError(
            f"mixing={spec.mixing} has no Triton kernels: use one of {', '.join(MIXING_CODE)}, or another"
            " backend"
        )
    return MIXING_CODE[spec.mixing]


def permutations(spec: ConnectionSpec, like: Tensor) -> Tensor | None:
    """(P padded to a power of two, n*n) fp32; None unless mixing=permutations."""
    if spec.mixing is not Mixing.PERMUTATIONS:
        return None
    return permutation_table(spec.num_streams, padded_permutations(spec), torch.float32, like.device)


def padded_permutations(spec: ConnectionSpec) -> int:
    return power_of_two_at_least(spec.num_res_coefficients) if spec.mixing is Mixing.PERMUTATIONS else 1
