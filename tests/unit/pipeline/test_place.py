"""Placement: safe programs, less exposed communication, recompute inside windows, memory within budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mhc_dist.config import load_config
from mhc_dist.pipeline import place_rank, slot_choice
from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Program
from mhc_dist.pipeline.cost import CostTable, with_slower_wires
from mhc_dist.pipeline.lower import lower, ops_of
from mhc_dist.pipeline.merge_slots import Group
from mhc_dist.pipeline.place import TIE, assemble, candidates, place, place_best
from mhc_dist.pipeline.placement import CAUTION, Placement
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.recompute_blocks import with_recompute
from mhc_dist.pipeline.run_times import RunTimes
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.pipeline.slot import Slot
from mhc_dist.pipeline.summary import Summary, summarize
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import run_costs
from tests.unit.pipeline.chunk_shapes import chunks_for, dense_chunk, experts_chunk
from tests.unit.pipeline.cost_tables import apart, costs_for

BENCH = Path(__file__).parents[3] / "configs" / "bench.yaml"


def recomputing_chunk() -> ChunkShape:
    """Three layers; attention drops, in blocks of two layers and one."""
    return with_recompute(experts_chunk(3), [["attention0", "attention1"], ["attention2"]])


def placed(
    name: str, shape: ChunkShape, *, wire: float, recompute: float = 0.0, placement: Placement | None = None
) -> tuple[Program, Summary]:
    schedule = make_schedule(name, 4, 16)
    costs = costs_for(schedule, shape, wire=wire, recompute=recompute)
    program = place(schedule, chunks_for(schedule, shape), costs, placement)
    return program, summarize(Simulation(program, costs))


def unplaced(name: str, shape: ChunkShape, *, wire: float, recompute: float = 0.0) -> Summary:
    schedule = make_schedule(name, 4, 16)
    costs = costs_for(schedule, shape, wire=wire, recompute=recompute)
    return summarize(Simulation(lower(schedule, chunks_for(schedule, shape)), costs))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    ("wire", "ranks"),
    [
        (0.0, (1, 2, 4)),
        (0.3, (1, 2, 4)),
        (1.0, (1, 2, 4, 6)),
        (5.0, (1, 2, 4)),
        *(pytest.param(wire, (6,), marks=pytest.mark.long) for wire in (0.0, 0.3, 5.0)),
    ],
)
def test_placed_programs_are_valid(name: str, wire: float, ranks: tuple[int, ...]) -> None:
    """Oracle: the validator, for every schedule, link speed and placement option."""
    for num_ranks in ranks:
        if name == "dualpipe" and num_ranks % 2:
            continue
        schedule = make_schedule(name, num_ranks, 2 * num_ranks + num_ranks % 2 * num_ranks)
        shape = recomputing_chunk()
        costs = costs_for(schedule, shape, wire=wire, counts=wire / 20, recompute=0.25, message=0.1)
        for placement in (
            Placement(),
            Placement(None, False, False),
            Placement(2500, late_counts=True, thorough=True),
        ):
            validate(place(schedule, chunks_for(schedule, shape), costs, placement))


@pytest.mark.parametrize("name", ["zbv", "dualpipev", "interleaved"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (2, 1)])
def test_chains_of_uneven_chunks_are_valid(name: str, num_ranks: int, lengths: tuple[int, int]) -> None:
    """Oracle: the validator. Every second chunk is shorter, so that it fits whole into a gap of another pass:
    the third pass of a chain must not start before the first one, whose result it needs, is over.
    """
    schedule = make_schedule(name, num_ranks, 3 * num_ranks)
    shapes = [experts_chunk(length) if length else dense_chunk() for length in lengths]
    longer, shorter = (costs_for(schedule, shape, wire=2.0) for shape in shapes)
    costs = replace(
        longer,
        phases={**shorter.phases, **longer.phases},
        exchanges={**shorter.exchanges, **longer.exchanges},
    )
    chunks = tuple(shapes[chunk % 2] for chunk in range(len(schedule.chunk_rank)))
    validate(place(schedule, chunks, costs))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_placing_is_deterministic_and_complete(name: str) -> None:
    """Oracle: the plain lowering does the same work, apart from where weight gradients are put off."""
    schedule = make_schedule(name, 4, 8)
    shape = recomputing_chunk()
    costs = costs_for(schedule, shape, wire=0.5, recompute=0.25)
    first = place(schedule, chunks_for(schedule, shape), costs)
    again = place(schedule, chunks_for(schedule, shape), costs)
    assert first.digest() == again.digest()
    plain = lower(schedule, chunks_for(schedule, shape))
    for ours, theirs in zip(first.actions, plain.actions, strict=True):
        kinds = (ActionKind.GRADIENT, ActionKind.WEIGHT)
        assert {str(a) for a in ours if a.kind not in kinds} == {
            str(a) for a in theirs if a.kind not in kinds
        }
        gradients = [
            {(a.chunk, a.microbatch, a.item) for a in r if a.kind is kinds[0]} for r in (ours, theirs)
        ]
        assert gradients[0] == gradients[1]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_weight_gradients_add_up_in_microbatch_order(name: str) -> None:
    """Oracle: the plain lowering's order per phase; sums of floats then agree bit for bit."""
    schedule = make_schedule(name, 4, 16)
    shape = recomputing_chunk()
    costs = costs_for(schedule, shape, wire=1.0, recompute=0.25)
    program = place(schedule, chunks_for(schedule, shape), costs)
    for actions in program.actions:
        order: dict[tuple[int, str], list[int]] = {}
        for a in actions:
            if a.kind is ActionKind.WEIGHT or (a.kind is ActionKind.GRADIENT and not a.defer_weights):
                order.setdefault((a.chunk, a.item), []).append(a.microbatch)
        assert all(order_of_phase == sorted(order_of_phase) for order_of_phase in order.values())


def test_exchanges_hide_behind_the_paired_microbatch() -> None:
    """Oracle: by hand. Half as much wire as compute per layer fits into the windows of a pair; what stays
    exposed belongs to fill and drain, so more microbatches hide a larger share.
    """
    before = unplaced("dualpipev", experts_chunk(3), wire=0.5)
    _, after = placed("dualpipev", experts_chunk(3), wire=0.5)
    assert after.all_to_all_hidden_ratio > 0.8
    assert after.step_seconds < 0.92 * before.step_seconds
    assert after.compute_seconds == pytest.approx(before.compute_seconds)
    schedule = make_schedule("dualpipev", 4, 64)
    costs = costs_for(schedule, experts_chunk(3), wire=0.5)
    long = summarize(Simulation(place(schedule, chunks_for(schedule, experts_chunk(3)), costs), costs))
    assert long.all_to_all_hidden_ratio > 0.95


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("wire", [0.25, 1.0])
def test_placing_never_loses_much(name: str, wire: float) -> None:
    """Oracle: the plain lowering under the same costs."""
    before = unplaced(name, experts_chunk(2), wire=wire)
    _, after = placed(name, experts_chunk(2), wire=wire)
    assert after.step_seconds <= 1.02 * before.step_seconds


@pytest.mark.parametrize("wire", [0.5, 1.0, 2.0])
def test_recompute_moves_into_windows(wire: float) -> None:
    """Oracle: the same costs with recompute right before use; and without recompute at all."""
    late = Placement(prefetch_recompute=False)
    _, before = placed("dualpipev", recomputing_chunk(), wire=wire, recompute=0.25, placement=late)
    _, after = placed("dualpipev", recomputing_chunk(), wire=wire, recompute=0.25)
    assert after.recompute_hidden_ratio > 0.65
    assert after.step_seconds <= (1 + TIE) * before.step_seconds
    if wire == 2.0:
        # Here windows are longer than what fills them, so most of the recompute costs nothing.
        free = placed("dualpipev", recomputing_chunk(), wire=wire)[1]
        assert after.step_seconds - free.step_seconds < 0.3 * after.recompute_seconds


def test_memory_budget_is_kept() -> None:
    """Oracle: the simulator's memory timeline, at every budget between too little and ample."""
    schedule = make_schedule("dualpipev", 4, 16)
    shape = recomputing_chunk()
    costs = costs_for(schedule, shape, wire=1.0, recompute=0.25)
    ample = placed("dualpipev", shape, wire=1.0, recompute=0.25)[1]
    needed = max(
        placed("dualpipev", shape, wire=1.0, recompute=0.25, placement=Placement(None, False, False))[
            1
        ].peak_bytes
    )
    for budget in range(needed + 60, max(ample.peak_bytes) + 60, 50):
        program = place(schedule, chunks_for(schedule, shape), costs, Placement(memory_budget=budget))
        assert max(summarize(Simulation(program, costs)).peak_bytes) <= budget


def test_without_exchanges_the_schedule_is_kept() -> None:
    """Oracle: the plain lowering; with nothing to hide there is nothing to move."""
    schedule = make_schedule("1f1b", 3, 5)
    chunks = chunks_for(schedule, dense_chunk())
    ours = place(schedule, chunks, costs_for(schedule, dense_chunk()))
    theirs = lower(schedule, chunks)
    for rank in range(3):
        kinds = (ActionKind.RECV,)
        assert [a for a in ours.actions[rank] if a.kind not in kinds] == [
            a for a in theirs.actions[rank] if a.kind not in kinds
        ]


def test_chunks_must_match_the_schedule() -> None:
    """Oracle: the reason written here by hand."""
    schedule = make_schedule("1f1b", 2, 2)
    with pytest.raises(ValueError, match="1 chunks given, but the schedule lays out 2"):
        place(schedule, (dense_chunk(),), costs_for(schedule, dense_chunk()))


def test_recompute_is_validated() -> None:
    """Oracle: by hand. A recompute left out, doubled, or before that of its block's start is refused."""
    schedule = make_schedule("1f1b", 1, 1)
    shape = with_recompute(experts_chunk(2), [["attention0", "attention1"]])
    program = lower(schedule, (shape,))
    actions = program.actions[0]
    where = [i for i, a in enumerate(actions) if a.kind is ActionKind.RECOMPUTE]
    assert [actions[i].item for i in where] == ["attention0", "attention1"]
    first, second = where
    for mutated, reason in [
        ([*actions[:second], *actions[second + 1 :]], "what it dropped was not recomputed"),
        ([*actions[:second], actions[second], *actions[second:]], "already recomputed"),
        (
            [*actions[:first], actions[second], *actions[first:second], *actions[second + 1 :]],
            "attention0 must be recomputed first",
        ),
        ([actions[first], *actions[:first], *actions[first + 1 :]], "its forward has not run"),
    ]:
        with pytest.raises(ValueError, match=reason):
            validate(replace(program, actions=(tuple(mutated),)))
    for blocks, reason in [
        ([["attention0"], ["attention0"]], "in two recompute blocks"),
        ([["attention9"]], "which the chunk does not have"),
    ]:
        with pytest.raises(ValueError, match=reason):
            with_recompute(experts_chunk(), blocks)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("wire", [0.5, 1.0])
def test_running_unpaired_passes_side_by_side_never_loses(name: str, wire: float) -> None:
    """Oracle: the same placement with the schedule's slots as they are; ZB1P and ZBV gain most."""
    apart = placed(name, experts_chunk(3), wire=wire, placement=Placement(merge_slots=False))[1]
    program, together = placed(name, experts_chunk(3), wire=wire)
    validate(program)
    assert together.step_seconds <= (1 + TIE) * apart.step_seconds
    assert together.exposed_all_to_all_ratio <= apart.exposed_all_to_all_ratio
    if name in ("zb1p", "zbv"):
        assert together.step_seconds < 0.99 * apart.step_seconds


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "hidden"), [(1, 8, 0.9), (4, 8, 0.7), (4, 16, 0.85)]
)
def test_fill_and_drain_hide_exchanges_too(num_ranks: int, num_microbatches: int, hidden: float) -> None:
    """Oracle: the same schedule with its slots as they are, where pairs hide most. Chains of forwards, and
    weight gradients in the gaps of the passes that put them off, hide much of the rest; nobody gets slower.
    """
    schedule = make_schedule("dualpipev", num_ranks, num_microbatches)
    shape = experts_chunk(2)
    chunks = chunks_for(schedule, shape)
    costs = costs_for(schedule, shape, wire=0.9)  # four exchanges: 0.5 of compute
    apart = place(schedule, chunks, costs, Placement(merge_slots=False))
    program = place(schedule, chunks, costs)
    validate(program)
    before, after = summarize(Simulation(apart, costs)), summarize(Simulation(program, costs))
    assert after.all_to_all_hidden_ratio > hidden
    assert after.all_to_all_hidden_ratio >= before.all_to_all_hidden_ratio
    assert after.step_seconds <= (1 + TIE) * before.step_seconds


def test_a_link_slower_than_told_stays_hidden() -> None:
    """Oracle: the program that was placed with the true speed. Told 15% too little, most stays hidden."""
    schedule = make_schedule("dualpipev", 1, 8)
    shape = experts_chunk(2)
    told = costs_for(schedule, shape, wire=0.9)
    true = with_slower_wires(told, 1.15)
    chunks = chunks_for(schedule, shape)
    misled = summarize(Simulation(place(schedule, chunks, told), true))
    informed = summarize(Simulation(place(schedule, chunks, true), true))
    assert misled.step_seconds < 1.02 * informed.step_seconds


def test_what_waits_late_costs_next_to_nothing() -> None:
    """Oracle: simulated runs of the placements that a run's program is chosen from."""
    schedule, shape = make_schedule("dualpipev", 1, 6), experts_chunk(2)
    chunks = chunks_for(schedule, shape)
    for wire in (1.0, 1.5):
        costs = costs_for(schedule, shape, wire=wire)
        best, simulation = place_best(schedule, chunks, costs)
        assert simulation.makespan == Simulation(best, costs).makespan
        others = [
            place(schedule, chunks, costs, Placement(late_counts=late, thorough=ahead))
            for late in (False, True)
            for ahead in (False, True)
        ]
        fastest = min(Simulation(other, costs).makespan for other in others)
        assert simulation.makespan <= (1 + CAUTION) * (1 + TIE) * fastest


def bench_case(mode: str, ratio: float) -> tuple[CoarseSchedule, tuple[ChunkShape, ...], CostTable]:
    """Costs of a real model's phases, and exchanges that take `ratio` of the compute."""
    config = load_config(BENCH, [f"recompute.mode={mode}", "schedule.num_microbatches=8"])
    costs = run_costs(config, Machine(load_cluster("laptop")))
    wires = [key for key in costs.exchanges if not key[1].startswith("counts")]
    compute = sum(c.forward + c.input_gradient + c.weight_gradient for c in costs.phases.values())
    wire = ratio * compute / (2 * len(wires))
    exchanges = {
        key: replace(cost, forward=wire, backward=wire) if key in wires else cost
        for key, cost in costs.exchanges.items()
    }
    return schedule_of(config), own_shapes(config).chunks, replace(costs, exchanges=exchanges)


@pytest.mark.parametrize(("ratio", "gain"), [(0.3, 1.0), (1.0, 1.05)])
def test_the_order_that_waits_least_is_taken(
    ratio: float, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: simulated runs of programs whose slots have only the order for slower wires to choose from."""
    case = bench_case("mhc", ratio)
    chosen = Simulation(place(*case), case[2]).makespan
    monkeypatch.setattr(slot_choice, "WIRE_FACTORS", ())
    assert gain * chosen <= 1.001 * Simulation(place(*case), case[2]).makespan


def test_wires_of_all_speeds_find_a_faster_order() -> None:
    """Oracle: the simulated run of the program that planning finds, with wires of two speeds."""
    case = bench_case("none", 0.9)
    planned, thorough = (
        Simulation(place(*case, Placement(thorough=every)), case[2]).makespan for every in (False, True)
    )
    assert 1.005 * thorough < planned


@pytest.mark.parametrize("mode", ["none", "mhc"])
def test_a_run_is_never_slower_than_planned(mode: str) -> None:
    """Oracle: the simulated run of the program that planning finds. More orders to choose from, slot by slot,
    do not always end in a faster step; and what is safer may cost CAUTION.
    """
    for ratio in (0.9, 1.1):
        case = bench_case(mode, ratio)
        planned = Simulation(place(*case), case[2]).makespan
        assert place_best(*case)[1].makespan <= (1 + CAUTION) * (1 + TIE) * planned
        jittery = replace(case[2], jitter=apart((0.9, 1.0, 1.1), 1, 2))
        chosen, _ = place_best(*case[:2], jittery)
        planned = Simulation(place(*case), jittery).makespan
        assert Simulation(chosen, jittery).makespan <= (1 + TIE) * planned


def test_looking_ahead_pays() -> None:
    """Oracle: simulated runs of the same slots, each of which begins when the one before is over."""
    case = bench_case("mhc", 0.9)
    seconds = [simulation.makespan for _, simulation in candidates(*case, Placement(thorough=True))]
    without, ahead = seconds[: len(seconds) // 2], seconds[len(seconds) // 2 :]
    assert 1.01 * min(ahead) < min(without)


def test_a_slot_waits_as_long_as_it_was_judged_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the simulator's time in waits of the whole program."""
    schedule, chunks, costs = bench_case("mhc", 0.8)
    judged: list[float] = []

    class Recording(slot_choice.SlotChooser):
        def order(self, slot: Slot) -> slot_choice.Order:
            order = super().order(slot)
            judged.append(slot_choice.Run(slot, order.steps, costs).waited)
            return order

    class Forgetful(dict[object, object]):
        """No slot is equal to an earlier one."""

        def __contains__(self, key: object) -> bool:
            return False

    monkeypatch.setattr(place_rank, "SlotChooser", Recording)
    for ahead in (False, True):
        layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
        placer = place_rank.RankPlacer(chunks, layout, costs, Placement())
        groups = [[Group(ops_of(slot)) for slot in schedule.ranks[0]]]
        monkeypatch.setattr(placer, "_slots", Forgetful())
        program = assemble(schedule, chunks, costs, placer, groups)
        if ahead:
            judged.clear()
            times = RunTimes(program, Simulation(program, costs))
            program = assemble(schedule, chunks, costs, placer, groups, times)
        (rank,) = Simulation(program, costs).ranks
        assert sum(judged) == pytest.approx(rank.blocked(ActionKind.WAIT), rel=1e-6)
        assert judged


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [("dualpipev", 1), ("dualpipev", 2), ("dualpipev", 3), ("1f1b", 2), ("zbv", 2), ("interleaved", 2)],
)
def test_programs_that_look_ahead_are_valid_and_do_the_same(name: str, num_ranks: int) -> None:
    """Oracles: the validator; the plain lowering, whose actions they hold; and a count of open passes."""
    schedule = make_schedule(name, num_ranks, 3 * num_ranks + num_ranks % 2 * num_ranks)
    shape = recomputing_chunk()
    chunks = chunks_for(schedule, shape)
    want = list(map(_phases_and_transfers, lower(schedule, chunks).actions))
    looked_ahead = 0
    for wire, late in ((0.4, False), (1.0, True), (3.0, False)):
        costs = costs_for(schedule, shape, wire=wire, counts=wire / 20, recompute=0.25, message=0.1)
        found = candidates(schedule, chunks, costs, Placement(thorough=True, late_counts=late))
        for program, _ in found[len(found) // 2 :]:
            validate(program)
            looked_ahead += max(map(_most_open, program.actions)) > 2
            assert list(map(_phases_and_transfers, program.actions)) == want
    assert looked_ahead or name != "dualpipev"


def _phases_and_transfers(actions: Sequence[Action]) -> list[str]:
    """In no order; without weight gradients, which plain backwards hold."""
    others = (action for action in actions if action.kind is not ActionKind.WEIGHT)
    return sorted(str(replace(action, defer_weights=False)) for action in others)


def _most_open(actions: Sequence[Action]) -> int:
    """Passes that are under way at the same time: a pair, and one that began early."""
    kinds = {ActionKind.COMPUTE: "F", ActionKind.GRADIENT: "B"}
    names = [(kinds[a.kind], a.chunk, a.microbatch) if a.kind in kinds else None for a in actions]
    first: dict[object, int] = {}
    last: dict[object, int] = {}
    for position, name in enumerate(names):
        if name is not None:
            first.setdefault(name, position)
            last[name] = position
    return max(
        sum(first[name] <= position <= last[name] for name in first) for position in range(len(actions))
    )


def test_recompute_does_not_delay_exchanges_that_take_as_long_as_compute() -> None:
    """Oracle: the same passes with recomputation right before each use, and with nothing to recompute.

    Costs of a real model's phases: with those of `costs_for`, moving recomputation never delays an exchange.
    """
    seconds = {}
    for mode, placement in (
        ("mhc", Placement()),
        ("mhc", Placement(prefetch_recompute=False)),
        ("none", None),
    ):
        case = bench_case(mode, 1.0)
        seconds[mode, placement] = Simulation(place(*case, placement), case[2]).makespan
    placed_seconds, late, nothing = seconds.values()
    assert placed_seconds <= 1.005 * late
    assert placed_seconds <= 1.03 * nothing


def test_counts_are_awaited_a_phase_later() -> None:
    """Oracle: the placed programs themselves, and simulated ranks of which each is late at times.

    At once, counts are issued and awaited without compute in between, and every rank waits for the others
    there. A phase later, peers may be late by that phase.
    """
    schedule, shape = make_schedule("dualpipev", 1, 12), experts_chunk(2)
    chunks = chunks_for(schedule, shape)
    costs = costs_for(schedule, shape, wire=0.8, counts=0.001)
    at_once, later = (place(schedule, chunks, costs, Placement(late_counts=late)) for late in (False, True))
    validate(later)
    assert _lone_counts(later) < 0.25 * _lone_counts(at_once)
    jittery = replace(costs, jitter=apart((0.8, 0.9, 1.0, 1.0, 1.0, 1.1, 1.2, 2.0), 1, 2))
    # Passes of fill and drain run alone: there is no phase to put in between.
    assert _counts_waits(later, jittery) < 0.6 * _counts_waits(at_once, jittery)
    best, _ = place_best(schedule, chunks, jittery)
    seconds = [Simulation(program, jittery).makespan for program in (best, later, at_once)]
    assert seconds[0] <= (1 + TIE) * min(seconds)


def _lone_counts(program: Program) -> int:
    """Exchanges of counts that nothing is computed under."""
    (actions,) = program.actions
    lone = 0
    for position, action in enumerate(actions):
        if action.kind is ActionKind.ISSUE and action.item.startswith("count"):
            wait = replace(action, kind=ActionKind.WAIT)
            between = actions[position : actions.index(wait)]
            lone += not any(a.kind in COMPUTE_KINDS for a in between)
    return lone


def _counts_waits(program: Program, costs: CostTable) -> float:
    return sum(
        done.starved + done.blocked
        for rank in Simulation(program, costs).ranks
        for done in rank.actions
        if done.action.kind is ActionKind.WAIT and done.action.item.startswith("count")
    )
