"""Calibration: the trace of a simulated run gives back the costs it was simulated with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.calibrate import calibrate, jitter_of
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.demonstration import Shown
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.perfetto import read_events, simulated_events, write_perfetto
from mhc_dist.pipeline.place import place
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.simulate import Simulation
from tests.unit.pipeline.chunk_shapes import chunks_for
from tests.unit.pipeline.cost_tables import apart, costs_for
from tests.unit.pipeline.test_place import recomputing_chunk


def wrong(costs: CostTable) -> CostTable:
    """The same table with every second tripled."""
    return replace(
        costs,
        phases={
            key: replace(
                cost,
                forward=3 * cost.forward,
                input_gradient=3 * cost.input_gradient,
                weight_gradient=3 * cost.weight_gradient,
                recompute=3 * cost.recompute,
            )
            for key, cost in costs.phases.items()
        },
        exchanges={
            key: replace(cost, forward=3 * cost.forward, backward=3 * cost.backward)
            for key, cost in costs.exchanges.items()
        },
        message=replace(costs.message, seconds=3 * costs.message.seconds),
        reduce_seconds=1.0,
    )


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipev"])
def test_gives_back_the_costs_of_a_simulated_run(name: str, tmp_path: Path) -> None:
    """Oracle: the costs that the simulated run was made with, through a file and without overlap."""
    schedule = make_schedule(name, 4, 8)
    shape = recomputing_chunk()
    truth = replace(
        costs_for(schedule, shape, wire=0.5, counts=0.0625, recompute=0.25, message=0.125), reduce_seconds=0.5
    )
    program = lower(schedule, chunks_for(schedule, shape))
    write_perfetto(Shown(program, Simulation(program, truth), "second"), tmp_path / "run.json")
    found = calibrate(wrong(truth), read_events(tmp_path / "run.json"))
    for key, phase in found.phases.items():
        expected = truth.phases[key]
        assert phase.forward == pytest.approx(expected.forward)
        assert phase.input_gradient == pytest.approx(expected.input_gradient)
        assert phase.weight_gradient == pytest.approx(expected.weight_gradient)
        assert phase.recompute == pytest.approx(expected.recompute)
    for key, exchange in found.exchanges.items():
        if "dispatch" not in key[1]:  # hidden in part behind the shared experts, whose wait may not block
            assert exchange.forward == pytest.approx(truth.exchanges[key].forward)
            assert exchange.backward == pytest.approx(truth.exchanges[key].backward)
    assert found.message.seconds == pytest.approx(truth.message.seconds)
    assert found.reduce_seconds == 0.5


def test_gives_back_what_starting_transfers_costs_the_thread() -> None:
    """Oracle: the overheads that the simulated run was made with, and its step's length without them."""
    schedule = make_schedule("dualpipev", 2, 8)
    shape = recomputing_chunk()
    plain = costs_for(schedule, shape, wire=0.5, message=0.125)
    overheads = {ActionKind.ISSUE: 0.03, ActionKind.SEND: 0.01, ActionKind.HAND_OVER: 0.005}
    program = lower(schedule, chunks_for(schedule, shape))
    simulation = Simulation(program, replace(plain, overheads=overheads))
    events = simulated_events(Shown(program, simulation, "second"))
    found = calibrate(plain, events)
    for kind, seconds in overheads.items():
        assert found.overheads[kind] == pytest.approx(seconds)
    assert Simulation(program, found).makespan == pytest.approx(simulation.makespan, rel=0.01)
    assert simulation.makespan > Simulation(program, plain).makespan


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "zbv", "dualpipev"])
def test_predicts_a_placed_run_from_the_trace_of_a_plain_one(name: str) -> None:
    """Oracle: the step time under the true costs, within 2%."""
    schedule = make_schedule(name, 4, 8)
    shape = recomputing_chunk()
    truth = costs_for(schedule, shape, wire=0.75, counts=0.03, recompute=0.25, message=0.125)
    plain = lower(schedule, chunks_for(schedule, shape))
    events = simulated_events(Shown(plain, Simulation(plain, truth), "second"))
    found = calibrate(wrong(truth), events)
    placed = place(schedule, chunks_for(schedule, shape), found)
    predicted, real = Simulation(placed, found).makespan, Simulation(placed, truth).makespan
    assert predicted == pytest.approx(real, rel=0.02)


def test_refuses_what_is_not_a_trace_of_this_run(tmp_path: Path) -> None:
    """Oracle: the reasons written here by hand."""
    path = tmp_path / "x.json"
    for content in ("[]", "{", json.dumps({"traceEvents": [{"ph": "X"}]})):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a trace of a run"):
            read_events(path)
    schedule = make_schedule("1f1b", 2, 2)
    shape = recomputing_chunk()
    program = lower(schedule, chunks_for(schedule, shape))
    costs = costs_for(schedule, shape)
    events = simulated_events(Shown(program, Simulation(program, costs), "second"))
    with pytest.raises(ValueError, match="has phase attention0 of chunk 0, which this run lacks"):
        calibrate(replace(costs, phases={}), events)


def test_gives_back_how_phases_differ() -> None:
    """Oracle: simulated ranks whose tempos are known: two of each pipeline rank, which differ. From their
    timelines the same step comes out again, and the one of another program to a hundredth; had the members'
    tempos been mixed up or averaged, they would not wait for each other as they do.
    """
    schedule, shape = make_schedule("dualpipev", 2, 16), recomputing_chunk()
    calm = costs_for(schedule, shape, wire=0.5, recompute=0.25, message=0.125)
    program = lower(schedule, chunks_for(schedule, shape))
    truth = replace(calm, jitter=apart((0.5, 1.0, 1.0, 3.5), 2, 2))
    real = Simulation(program, truth)
    timelines = [rank.actions for rank in real.ranks]
    found = replace(calm, jitter=jitter_of(calm, (timelines[:2], timelines[2:])))
    again = Simulation(program, found)
    assert again.makespan == pytest.approx(real.makespan)
    for one, other in zip(again.ranks, real.ranks, strict=True):
        assert one.seconds == pytest.approx(other.seconds)
        assert one.blocked(ActionKind.WAIT) == pytest.approx(other.blocked(ActionKind.WAIT))
    placed = place(schedule, chunks_for(schedule, shape), calm)
    predicted = Simulation(placed, found).makespan
    assert predicted == pytest.approx(Simulation(placed, truth).makespan, rel=0.01)
    assert predicted > 1.1 * Simulation(placed, calm).makespan
    with pytest.raises(ValueError, match="none of 0 phases costs anything"):
        jitter_of(calm, ([timelines[0], []],))
