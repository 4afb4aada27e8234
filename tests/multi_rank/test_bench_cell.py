"""The ranks of a bench run the model that a run of the same configuration would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhc_dist.bench.cell import Cell, message_bytes, run_ranks
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.lower import lower
from mhc_dist.plan.layout import own_shapes, schedule_of
from tests.small import small_config


def step(rank: int, store: str, config: RunConfig, result: Path) -> None:
    program = lower(schedule_of(config), own_shapes(config).chunks)
    cell = Cell.join(rank, store, config, program.links)
    _, trace = cell.runner(cell.stage(config, program), program).step()
    if rank == 0:
        result.write_text(
            json.dumps([e.payload_bytes for e in trace.events if e.action.kind is ActionKind.SEND])
        )
    cell.leave()


@pytest.mark.parametrize("shifted", [False, True])
def test_messages_carry_what_the_model_sends(shifted: bool) -> None:
    """Oracle: 12 tokens of 4 streams of 32 channels in fp32, with `shifted_pre` one more of H_pre."""
    config = small_config(
        model={"num_layers": 4},
        residual={"shifted_pre": shifted},
        parallel={"pipeline": 2},
        schedule={"name": "1f1b", "num_microbatches": 2},
    )
    want = 12 * 4 * (32 + shifted) * 4
    assert message_bytes(config) == want
    assert run_ranks(step, config) == [want, want]
