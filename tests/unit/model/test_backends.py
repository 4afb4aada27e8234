"""Oracle: the kernels' own list of backends."""

from __future__ import annotations

from typing import get_args

import pytest
from mhc_kernels.seam import BACKEND_NAMES, make_backend

from mhc_dist.config import KernelsConfig


def test_config_offers_exactly_the_backends_there_are() -> None:
    assert get_args(KernelsConfig.model_fields["backend"].annotation) == BACKEND_NAMES


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_a_backend_is_what_was_asked_for_or_refused(name: str) -> None:
    """Oracle: the name; one that cannot run here says why, and nothing takes its place."""
    try:
        backend = make_backend(name)  # type: ignore[arg-type]
    except ValueError as error:
        assert name in str(error)
    else:
        assert backend.name == name
