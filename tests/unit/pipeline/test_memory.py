"""Live memory of programs, against the simulator's timeline and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mhc_dist.pipeline.cost import MessageCost
from mhc_dist.pipeline.errors import InvalidProgram
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.memory import check_memory, held_bytes, settled_bytes
from mhc_dist.pipeline.place import place
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.simulate import Simulation
from tests.unit.pipeline.chunk_shapes import chunks_for, dense_chunk
from tests.unit.pipeline.cost_tables import costs_for
from tests.unit.pipeline.test_place import recomputing_chunk


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_agrees_with_the_simulator(name: str) -> None:
    """Oracle: the peak of the simulator's memory timeline, rank by rank."""
    schedule = make_schedule(name, 4, 8)
    shape = recomputing_chunk()
    costs = costs_for(schedule, shape, wire=0.5, recompute=0.25, message=0.1)
    program = place(schedule, chunks_for(schedule, shape), costs)
    peaks = [rank.peak_bytes for rank in Simulation(program, costs).ranks]
    assert [max(held for _, held in held_bytes(program, costs, rank)) for rank in range(4)] == peaks
    check_memory(program, costs, max(peaks))
    with pytest.raises(InvalidProgram, match="1 bytes too much"):
        check_memory(program, costs, max(peaks) - 1)


def test_a_channel_keeps_one_message() -> None:
    """Oracle: by hand. The inner rank of 1F1B has two channels out, so it ends with two buffers of 10;
    messages cancel otherwise.
    """
    schedule = make_schedule("1f1b", 3, 4)
    costs = replace(costs_for(schedule, dense_chunk()), message=MessageCost(0.0, 10))
    program = lower(schedule, chunks_for(schedule, dense_chunk()))
    ends = [settled_bytes(program, costs, rank)[-1][1] for rank in range(3)]
    assert [end - 1000 for end in ends] == [10, 20, 10]
    assert [rank.memory[-1][1] for rank in Simulation(program, costs).ranks] == [1000] * 3


def test_names_the_action_that_does_not_fit() -> None:
    """Oracle: by hand. 1F1B, three ranks: rank 0 has room for two microbatches of 100."""
    schedule = make_schedule("1f1b", 3, 4)
    costs = replace(costs_for(schedule, dense_chunk()), message=MessageCost())
    program = lower(schedule, chunks_for(schedule, dense_chunk()))
    with pytest.raises(InvalidProgram, match=r"rank 0, compute c0 m2 body: needs .* 100 bytes too much"):
        check_memory(program, costs, 1200)
