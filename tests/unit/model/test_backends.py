"""Oracle: the kernels' own list of backends."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from mhc_kernels.seam import BACKEND_NAMES, make_backend

from mhc_dist.config_sections import KernelsConfig


def test_config_offers_exactly_the_backends_there_are() -> None:
    assert get_args(KernelsConfig.model_fields["backend"].annotation) == BACKEND_NAMES


@pytest.mark.parametrize("name", ["reference", "cpu", "compiled"])
def test_a_backend_is_what_was_asked_for(name: Any) -> None:
    """Oracle: the name."""
    assert make_backend(name).name == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can run the GPU kernels")
def test_gpu_kernels_are_refused_without_a_gpu() -> None:
    """Oracle: the reason; nothing takes their place silently."""
    with pytest.raises(ValueError, match=r"triton.*GPU"):
        make_backend("triton")
