"""What is compared: residual kinds under names of their own. Imports no torch."""

from __future__ import annotations

from typing import Any

from mhc_dist.config import RunConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "residual": {"kind": "residual", "num_streams": 1},
    "hc": {"kind": "hc"},
    "mhc": {"kind": "mhc", "init": "identity_leaning"},
    "mhc_zero_bias": {"kind": "mhc", "init": "paper_zero_bias"},
    "identity": {"kind": "identity"},
    "mhc_lite": {"kind": "mhc_lite"},
    "krom": {"kind": "krom", "num_streams": 8},
    "mhc_shifted": {"kind": "mhc", "shifted_pre": True},
}

MAIN = ("residual", "hc", "mhc", "mhc_zero_bias", "identity")
"""Run with all seeds; the others, as a rule, with one."""

OPTIONS = tuple(name for name in VARIANTS if name not in MAIN)


def variant_config(config: RunConfig, variant: str, seed: int) -> RunConfig:
    """`config` with the variant's residual and another seed for its weights; the data stay the same.

    Raises ValueError for an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}: choose from {', '.join(VARIANTS)}")
    document = config.model_dump(mode="json")
    document["residual"] |= {"num_streams": 4, "shifted_pre": False} | VARIANTS[variant]
    document["train"]["seed"] = seed
    return RunConfig.model_validate(document)
