"""Lowered and placed programs, action by action, against files reviewed by eye."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.demonstration import demonstrate
from mhc_dist.pipeline.lower import lower, lower_evaluation
from mhc_dist.pipeline.schedules.registry import make_schedule
from tests.unit.pipeline.chunk_shapes import dense_chunk, experts_chunk

GOLDEN = Path(__file__).parents[2] / "golden" / "programs"


def program_of(name: str) -> Program:
    match name:
        case "lowered-1f1b-2-3":
            return lower(make_schedule("1f1b", 2, 3), (dense_chunk(),) * 2)
        case "lowered-zbv-2-3":
            return lower(make_schedule("zbv", 2, 3), (experts_chunk(),) * 4)
        case "evaluation-v-2":
            return lower_evaluation((0, 1, 1, 0), (experts_chunk(),) * 4, 2)
        case "placed-dualpipev-2-4":
            return demonstrate(make_schedule("dualpipev", 2, 4), wire=0.25, recompute=0.25).program
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name", ["lowered-1f1b-2-3", "lowered-zbv-2-3", "evaluation-v-2", "placed-dualpipev-2-4"]
)
def test_golden_programs(name: str) -> None:
    """Oracle: the file. A change of order is a decision; review the difference before replacing it."""
    assert program_of(name).text() == (GOLDEN / f"{name}.txt").read_text()
