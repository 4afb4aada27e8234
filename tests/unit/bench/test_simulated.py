"""What a bench makes of watched steps: whose tempo is whose, and predictions step by step."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mhc_dist.bench.calibrated import calibrated_by
from mhc_dist.bench.cell import Cell
from mhc_dist.bench.simulated import compared_steps, prediction
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.trace import Event
from mhc_dist.topology import Topology
from tests.unit.pipeline.chunk_shapes import chunks_for, experts_chunk
from tests.unit.pipeline.cost_tables import apart, costs_for

SCHEDULE, SHAPE = make_schedule("1f1b", 2, 6), experts_chunk()
CALM = costs_for(SCHEDULE, SHAPE, wire=0.5, message=0.125)
PROGRAM = lower(SCHEDULE, chunks_for(SCHEDULE, SHAPE))


def test_every_rank_keeps_its_own_tempo() -> None:
    """Oracle: a simulated run of two pipeline ranks and two expert groups of two members each, whose tempos
    are known. The first groups' come back, each where it was watched, and so does every member's time.
    """
    runs = [Simulation(PROGRAM, replace(CALM, jitter=apart(factors, 2, 2))) for factors in ((1, 3), (2, 5))]
    topology = Topology(pipeline=2, data=4, expert=2)
    ranks: list[Any] = [None] * 8
    for group, run in enumerate(runs):
        for place, rank in enumerate(run.ranks):
            events = [Event(a.action, a.start, a.end) for a in rank.actions]
            ranks[topology.rank_of(place // 2, 2 * group + place % 2)] = [events]
    cell = cast(Cell, SimpleNamespace(topology=topology, gather=lambda own: ranks))
    found = calibrated_by(cell, CALM, ranks[0], in_delay_mode=True)
    again = Simulation(PROGRAM, replace(found, overheads={}))
    assert [rank.seconds for rank in again.ranks] == pytest.approx([rank.seconds for rank in runs[0].ranks])
    assert len({round(rank.seconds, 6) for rank in runs[0].ranks}) > 1


def test_ratios_are_of_pairs() -> None:
    """Oracle: by hand. A machine at a third of its speed during the last pair moves no ratio."""
    said = compared_steps([2.0, 2.2, 6.3], [2.0, 2.0, 6.0])
    assert said == pytest.approx({"predicted_seconds": 2.2, "measured_seconds": 2.0, "ratio": 1.05})
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compared_steps([1.0, 1.0], [1.0])


def test_each_step_is_predicted_from_costs_of_its_time() -> None:
    """Oracle: the simulated step of each cost table; the median ratio of three is the middle one's."""
    costs = [replace(CALM, jitter=apart((factor,), 2, 2)) for factor in (1.0, 2.0, 4.0)]
    steps = [Simulation(PROGRAM, at).makespan for at in costs]
    said = prediction(PROGRAM, costs, [0.9 * steps[0], steps[1], 1.2 * steps[2]])
    assert said["predicted_seconds"] == median(steps)
    assert said["ratio"] == 1.0
    assert said["seconds_without_jitter"] == Simulation(PROGRAM, CALM).makespan
