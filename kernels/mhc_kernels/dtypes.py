"""Number formats that follow from the streams'."""

from __future__ import annotations

import torch


def coefficient_dtype(stream_dtype: torch.dtype) -> torch.dtype:
    """Coefficients are fp32; fp64 streams (oracles, gradcheck) keep everything in fp64."""
    return torch.float64 if stream_dtype == torch.float64 else torch.float32
