"""The simulator against the exact unit-cost clock, and against timelines worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.cost import Jitter, MessageCost
from mhc_dist.pipeline.errors import InvalidProgram
from mhc_dist.pipeline.lower import lower, lower_evaluation
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.summary import summarize
from mhc_dist.pipeline.tempo import Tempo
from mhc_dist.pipeline.unit_costs import UnitCosts, run_unit_costs
from tests.unit.pipeline.chunk_shapes import chunks_for, dense_chunk, experts_chunk
from tests.unit.pipeline.cost_tables import apart, costs_for


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_agrees_with_the_unit_cost_clock(name: str, num_ranks: int) -> None:
    """Oracle: the exact clock, where no pair is split. Pairs run one after the other here, so at most it."""
    schedule = make_schedule(name, num_ranks, 3 * num_ranks)
    simulation = Simulation(
        lower(schedule, chunks_for(schedule, dense_chunk())), costs_for(schedule, dense_chunk())
    )
    exact = run_unit_costs(schedule, UnitCosts())
    share = num_ranks * schedule.num_copies / len(schedule.chunk_rank)
    if name in ("dualpipe", "dualpipev"):
        assert share * simulation.makespan <= exact.makespan
    else:
        assert share * simulation.makespan == pytest.approx(float(exact.makespan))
        idle = [share * (simulation.makespan - rank.busy(*COMPUTE)) for rank in simulation.ranks]
        assert idle == pytest.approx([float(x) for x in exact.idle_per_rank])


COMPUTE = (ActionKind.COMPUTE, ActionKind.GRADIENT, ActionKind.WEIGHT)


def test_messages_by_hand() -> None:
    """Oracle: by hand. 1F1B, two ranks, one microbatch: F, message, F, B, message, B, reduce, step."""
    schedule = make_schedule("1f1b", 2, 1)
    costs = replace(costs_for(schedule, dense_chunk(), message=0.5), reduce_seconds=0.25, step_seconds=0.125)
    simulation = Simulation(lower(schedule, (dense_chunk(),) * 2), costs)
    assert simulation.makespan == 1 + 0.5 + 1 + 2 + 0.5 + 2 + 0.25 + 0.125
    arrivals = [a for a in simulation.ranks[0].actions if a.action.kind is ActionKind.ARRIVE]
    assert [(a.starved, a.blocked) for a in arrivals] == [(3.5, 0.5)]
    figures = summarize(simulation)
    assert figures.exposed_p2p_ratio == pytest.approx((0.5 + 0.5) / (2 * simulation.makespan))


def test_lanes_carry_one_thing_at_a_time() -> None:
    """Oracle: by hand. Two messages of 3 s leave a rank 1 s apart on one lane: the second lands 3 s later."""
    schedule = make_schedule("gpipe", 2, 2)
    costs = costs_for(schedule, dense_chunk(), message=3.0)
    flights = Simulation(lower(schedule, (dense_chunk(),) * 2), costs).ranks[0].flights
    assert [(f.start, f.end) for f in flights] == [(1.0, 4.0), (4.0, 7.0)]


def test_exchange_windows_by_hand() -> None:
    """Oracle: by hand. One expert layer: the dispatch hides behind the shared experts as far as they last."""
    schedule = make_schedule("1f1b", 1, 1)
    costs = costs_for(schedule, experts_chunk(), wire=0.75)
    simulation = Simulation(lower_evaluation((0,), (experts_chunk(),), 1), costs)
    waits = {
        a.action.item: a.blocked for a in simulation.ranks[0].actions if a.action.kind is ActionKind.WAIT
    }
    assert waits == {"count0": 0.0, "dispatch0": 0.5, "combine0": 0.75}
    assert simulation.makespan == 1.0 + 0.25 + 0.5 + 1.0 + 0.75 + 0.125
    assert summarize(simulation).all_to_all_hidden_ratio == pytest.approx(0.25 / 1.5)


def test_memory_of_1f1b_by_hand() -> None:
    """Oracle: by hand. Rank r holds P - r microbatches of 100 bytes over its static 1000; plus messages."""
    schedule = make_schedule("1f1b", 4, 8)
    costs = replace(costs_for(schedule, dense_chunk()), message=MessageCost())
    simulation = Simulation(lower(schedule, chunks_for(schedule, dense_chunk())), costs)
    assert [rank.peak_bytes for rank in simulation.ranks] == [1400, 1300, 1200, 1100]
    assert [rank.memory[-1][1] for rank in simulation.ranks] == [1000] * 4


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_all_memory_is_given_back(name: str) -> None:
    """Oracle: conservation. Whatever the program, a step ends with what it began with."""
    schedule = make_schedule(name, 4, 8)
    costs = costs_for(schedule, experts_chunk(2), wire=0.5, message=0.1)
    simulation = Simulation(lower(schedule, chunks_for(schedule, experts_chunk(2))), costs)
    assert [rank.memory[-1][1] for rank in simulation.ranks] == [1000] * 4
    assert all(rank.peak_bytes > 1000 for rank in simulation.ranks)


def test_seconds_add_up() -> None:
    """Oracle: wall time. Busy, blocked, starved and the tail of a rank make up the whole step."""
    schedule = make_schedule("dualpipev", 4, 8)
    costs = costs_for(schedule, experts_chunk(2), wire=0.5, counts=0.01, message=0.1)
    simulation = Simulation(lower(schedule, chunks_for(schedule, experts_chunk(2))), costs)
    figures = summarize(simulation)
    covered = figures.compute_seconds / figures.step_seconds
    total = covered + figures.bubble_ratio + figures.exposed_all_to_all_ratio + figures.exposed_p2p_ratio
    assert total == pytest.approx(1.0)


def test_a_stuck_program_is_an_error() -> None:
    """Oracle: by hand. Without its receive, rank 1 waits for ever."""
    schedule = make_schedule("1f1b", 2, 1)
    program = lower(schedule, (dense_chunk(),) * 2)
    without = tuple(a for a in program.actions[1] if a.kind is not ActionKind.RECV)
    with pytest.raises(InvalidProgram, match="waits for ever"):
        Simulation(
            replace(program, actions=(program.actions[0], without)), costs_for(schedule, dense_chunk())
        )


def test_members_of_a_group_wait_for_each_other() -> None:
    """Oracle: by hand. Two ranks whose phases all last twice their cost: twice the compute, the same wires;
    with tempos that differ, an exchange lands for all when the latest one's data do.
    """
    schedule, shape = make_schedule("1f1b", 1, 1), experts_chunk()
    calm = costs_for(schedule, shape, wire=0.75)
    program = lower_evaluation((0,), (shape,), 1)
    twice = Simulation(program, replace(calm, jitter=Jitter(((Tempo(((1.0, 2.0),)),) * 2,))))
    # dispatch behind the shared experts (0.25), now 0.5 of its 0.75; combine behind nothing
    assert [rank.seconds for rank in twice.ranks] == [2 * (1.0 + 0.25 + 1.0 + 0.125) + 0.25 + 0.75] * 2
    uneven = Simulation(program, replace(calm, jitter=apart((1.0, 1.5, 4.0), 1, 3)))
    late = 0
    for item in ("count0", "dispatch0", "combine0"):
        issued, landed, waited = [], [], []
        for rank in uneven.ranks:
            (flight,) = (f for f in rank.flights if f.action.item == item)
            (wait,) = (a for a in rank.actions if a.action.item == item and a.action.kind is ActionKind.WAIT)
            issued.append(flight.start)
            landed.append(flight.end)
            waited.append(wait)
        late += len(set(issued)) - 1
        for wait in waited:
            assert wait.end == max(wait.start, *landed)
            assert wait.starved == pytest.approx(max(0.0, min(wait.end, max(issued)) - wait.start))
    assert late


def test_ranks_that_are_slow_at_the_same_time_do_not_wait_for_each_other() -> None:
    """Oracle: the same tempos, on one member started over half-way: as much work at each speed, so without
    exchanges every rank would be as long at it; but now ranks starve at exchanges.
    """
    schedule, shape = make_schedule("1f1b", 1, 8), experts_chunk()
    program = lower(schedule, (shape,))
    calm = costs_for(schedule, shape, wire=0.5)
    pieces = tuple((0.5, factor) for factor in (1.0, 1.0, 3.0, 1.0) * 4)
    slow_together = Tempo(pieces)
    shifted = Tempo(pieces[2:] + pieces[:2])
    together, uneven = (
        Simulation(program, replace(calm, jitter=Jitter((tempos,))))
        for tempos in ((slow_together, slow_together), (slow_together, shifted))
    )

    def starved(simulation: Simulation) -> float:
        return sum(action.starved for rank in simulation.ranks for action in rank.actions)

    assert starved(together) == 0.0
    assert starved(uneven) > 0.1 * uneven.makespan
    assert uneven.makespan > 1.05 * together.makespan


def test_a_wait_costs_its_thread_nothing_more_where_it_blocks() -> None:
    """Oracle: by hand. Ending an exchange takes 0.125 by itself: that lengthens waits that find everything
    there, and none that wait for longer.
    """
    schedule, shape = make_schedule("1f1b", 1, 1), experts_chunk()
    program = lower_evaluation((0,), (shape,), 1)

    def waits(wire: float) -> dict[str, float]:
        costs = replace(costs_for(schedule, shape, wire=wire), overheads={ActionKind.WAIT: 0.125})
        (rank,) = Simulation(program, costs).ranks
        return {a.action.item: a.end - a.start for a in rank.actions if a.action.kind is ActionKind.WAIT}

    # The shared experts' 0.25 lie under the dispatch, nothing under the combine.
    assert waits(0.75) == pytest.approx({"count0": 0.125, "dispatch0": 0.5, "combine0": 0.75})
    assert waits(0.25) == pytest.approx({"count0": 0.125, "dispatch0": 0.125, "combine0": 0.25})
    assert waits(0.0625) == pytest.approx({"count0": 0.125, "dispatch0": 0.125, "combine0": 0.125})
