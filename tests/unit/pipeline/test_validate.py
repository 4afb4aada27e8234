"""The validator accepts every lowered schedule and refuses every mutation that changes its meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    Action,
    ActionKind,
    ExchangeShape,
    Pass,
    PhaseShape,
    Program,
)
from mhc_dist.pipeline.lower import lower, lower_evaluation
from mhc_dist.pipeline.place import place
from mhc_dist.pipeline.recompute_blocks import with_recompute
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.validate import InvalidProgram, validate
from tests.unit.pipeline.chunk_shapes import chunks_for, dense_chunk, experts_chunk
from tests.unit.pipeline.cost_tables import costs_for

K = ActionKind


def check_grid(num_ranks: int, microbatches: Iterable[int]) -> int:
    """Validate every schedule that these P and M allow; return how many there were."""
    count = 0
    for name in SCHEDULES:
        for num_microbatches in microbatches:
            try:
                schedule = make_schedule(name, num_ranks, num_microbatches)
            except ValueError:
                continue
            validate(lower(schedule, chunks_for(schedule, dense_chunk())))
            count += 1
    return count


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_whole_grid_is_valid(num_ranks: int) -> None:
    """Oracle: the validator, over every schedule with P <= 16 and M <= 64.

    One phase a chunk is enough: P and M decide the order of passes and of messages between ranks, and that is
    all of a program that can go wrong between ranks. What is inside a pass is the same for all P and M; the
    tests below have exchanges, several layers, recomputation and evaluation.
    """
    assert check_grid(num_ranks, range(1, 65)) > 200


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_experts_and_evaluation_are_valid(name: str) -> None:
    """Oracle: the validator, with exchanges, several layers a chunk, and forward only."""
    for num_ranks in (2, 4, 6):
        for num_microbatches in (2 * num_ranks, 4 * num_ranks):
            schedule = make_schedule(name, num_ranks, num_microbatches)
            validate(lower(schedule, chunks_for(schedule, experts_chunk(2))))
            if schedule.num_copies == 1:
                chunks = chunks_for(schedule, experts_chunk())
                for few in (1, 3, num_microbatches):
                    validate(lower_evaluation(schedule.chunk_rank, chunks, few))


def small_programs() -> list[Program]:
    """Every schedule, lowered; evaluation; and placed programs with recomputation."""
    programs = []
    smallest = {"1f1b": 2, "dualpipe": 4, "dualpipev": 4, "gpipe": 2, "interleaved": 2, "zb1p": 3, "zbv": 3}
    assert smallest.keys() == SCHEDULES.keys()
    for name, num_microbatches in smallest.items():
        schedule = make_schedule(name, 2, num_microbatches)
        programs.append(lower(schedule, chunks_for(schedule, experts_chunk())))
    programs.append(lower_evaluation((0, 1, 1, 0), (experts_chunk(),) * 4, 2))
    # Placed, with a recompute block of two phases, and with pairs, chains and early recomputation.
    for name, num_microbatches, num_layers in (("1f1b", 3, 2), ("zbv", 3, 1), ("dualpipev", 5, 1)):
        schedule = make_schedule(name, 2, num_microbatches)
        block = [f"attention{layer}" for layer in range(num_layers)]
        shape = with_recompute(experts_chunk(num_layers), [block])
        costs = costs_for(schedule, shape, wire=0.5, recompute=0.25)
        programs.append(place(schedule, chunks_for(schedule, shape), costs))
    return programs


PROGRAMS = small_programs()
IDS = [f"{i}-{p.schedule}-{p.num_ranks}-{p.num_microbatches}" for i, p in enumerate(PROGRAMS)]


def with_rank(program: Program, rank: int, actions: list[Action]) -> Program:
    changed = list(program.actions)
    changed[rank] = tuple(actions)
    return replace(program, actions=tuple(changed))


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_deleting_any_action_is_caught(program: Program) -> None:
    """Oracle: a lowered program contains nothing superfluous."""
    for rank, actions in enumerate(program.actions):
        for i in range(len(actions)):
            with pytest.raises(InvalidProgram, match=r"^rank \d+, "):
                validate(with_rank(program, rank, [*actions[:i], *actions[i + 1 :]]))


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_duplicating_any_action_is_caught(program: Program) -> None:
    """Oracle: everything happens exactly once."""
    for rank, actions in enumerate(program.actions):
        for i, action in enumerate(actions):
            for where in (i, len(actions)):
                mutated = [*actions[:where], action, *actions[where:]]
                with pytest.raises(InvalidProgram, match=r"^rank \d+, "):
                    validate(with_rank(program, rank, mutated))


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_moving_an_action_to_another_rank_is_caught(program: Program) -> None:
    """Oracle: chunks belong to ranks, and REDUCE and STEP happen once on each."""
    for i in range(len(program.actions[0])):
        moved = program.actions[0][i]
        stripped = with_rank(program, 0, [*program.actions[0][:i], *program.actions[0][i + 1 :]])
        with pytest.raises(InvalidProgram):
            validate(with_rank(stripped, 1, [*program.actions[1], moved]))


def must_precede(program: Program, first: Action, second: Action) -> bool:
    """Whether `first` has to come before `second` on one rank; written from the vocabulary's rules alone."""
    if second.kind in (K.REDUCE, K.STEP):
        return True
    if first.kind in (K.RECV, K.SEND) and second.kind is first.kind and first.peer == second.peer:
        return True
    if K.RECV in (first.kind, second.kind):
        same = (first.chunk, first.microbatch, first.direction) == (
            second.chunk,
            second.microbatch,
            second.direction,
        )
        return second.kind is K.ARRIVE and same
    if first.microbatch != second.microbatch:
        return False
    makes = {(first.chunk, value) for value in produced(program, first)}
    if first.kind is K.HAND_OVER:
        step = 1 if first.direction is Pass.FORWARD else -1
        makes = {(first.chunk + step, (first.direction, "arrived"))}
    needs = {(second.chunk, value) for value in needed(program, second)}
    return bool(makes & needs) or (second.kind is K.FREE and first.chunk == second.chunk)


def produced(program: Program, action: Action) -> set[object]:
    """Marks that an action leaves for the actions that need them."""
    match action.kind:
        case K.COMPUTE | K.GRADIENT | K.WEIGHT | K.RECOMPUTE:
            return {(action.kind, action.item)}
        case K.ISSUE | K.WAIT:
            return {(action.kind, action.item, action.direction)}
        case K.ARRIVE:
            return {(action.direction, "arrived")}
        case _:
            return set()


def needed(program: Program, action: Action) -> set[object]:
    """Marks that an action needs, derived from the shape of its chunk."""
    items = program.chunks[action.chunk].items
    item = next((i for i in items if i.name == action.item), None)

    def value_marks(value: str) -> set[object]:
        if value == CHUNK_INPUT:
            return {(Pass.FORWARD, "arrived")}
        writer = next(i for i in items if value in i.writes)
        if isinstance(writer, ExchangeShape):
            return {(K.WAIT, writer.name, Pass.FORWARD)}
        return {(K.COMPUTE, writer.name)}

    def gradient_marks(value: str) -> set[object]:
        marks: set[object] = {(Pass.BACKWARD, "arrived")} if value == CHUNK_OUTPUT else set()
        for reader in items:
            if isinstance(reader, ExchangeShape):
                if reader.differentiable and reader.reads[0] == value:
                    marks.add((K.WAIT, reader.name, Pass.BACKWARD))
            elif value in reader.reads:
                marks.add((K.GRADIENT, reader.name))
        return marks

    forward = action.direction is Pass.FORWARD
    match action.kind:
        case K.COMPUTE:
            assert item is not None
            return set().union(*map(value_marks, item.reads))
        case K.GRADIENT:
            assert item is not None
            assert isinstance(item, PhaseShape)
            before = {(K.RECOMPUTE, item.name)} if item.drops else set()
            return before.union({(K.COMPUTE, item.name)}, *map(gradient_marks, item.writes))
        case K.RECOMPUTE:
            assert isinstance(item, PhaseShape)
            return {(K.COMPUTE, item.name)}.union((K.RECOMPUTE, name) for name in item.recompute_after)
        case K.WEIGHT:
            return {(K.GRADIENT, action.item)}
        case K.ISSUE:
            assert item is not None
            marks = map(value_marks, item.reads) if forward else map(gradient_marks, item.writes)
            return set().union(*marks)
        case K.WAIT:
            return {(K.ISSUE, action.item, action.direction)}
        case K.SEND | K.HAND_OVER:
            return value_marks(CHUNK_OUTPUT) if forward else gradient_marks(CHUNK_INPUT)
        case _:
            return set()


def reason_against(program: Program) -> str | None:
    """The first word of the validator's reason; None when it accepts."""
    try:
        validate(program)
    except InvalidProgram as error:
        return error.reason.split(":")[0]
    return None


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_swapping_neighbours_is_caught_exactly_when_one_needs_the_other(program: Program) -> None:
    """Oracle: `must_precede`. To send before posting, or to wait before sending, may also deadlock, which is
    caught as such.
    """
    caught = kept = 0
    for rank, actions in enumerate(program.actions):
        for i, (first, second) in enumerate(pairwise(actions)):
            swapped = with_rank(program, rank, [*actions[:i], second, first, *actions[i + 2 :]])
            if must_precede(program, first, second):
                with pytest.raises(InvalidProgram):
                    validate(swapped)
                caught += 1
            elif (first.kind, second.kind) in ((K.RECV, K.SEND), (K.SEND, K.ARRIVE)):
                assert reason_against(swapped) in (None, "deadlock")
            else:
                validate(swapped)
                kept += 1
    assert caught > 50
    assert kept > 5


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_moving_to_the_front_is_caught(program: Program) -> None:
    """Oracle: nothing but a receive, or what starts the rank anyway, can come first."""
    for rank, actions in enumerate(program.actions):
        for i in range(1, len(actions)):
            action = actions[i]
            free_to_move = not any(must_precede(program, a, action) for a in actions[:i])
            moved = with_rank(program, rank, [action, *actions[:i], *actions[i + 1 :]])
            if free_to_move:
                validate(moved)
            else:
                with pytest.raises(InvalidProgram):
                    validate(moved)


def test_deadlock_names_rank_action_and_reason() -> None:
    """Oracle: by hand. Both ranks post their receive only after sending what the other has not posted yet."""
    program = lower(make_schedule("1f1b", 2, 2), (dense_chunk(),) * 2)
    for rank in (0, 1):
        actions = [a for a in program.actions[rank] if a.kind is not K.RECV]
        late = [b for a in actions for b in ((replace(a, kind=K.RECV), a) if a.kind is K.ARRIVE else (a,))]
        program = with_rank(program, rank, late)
    with pytest.raises(InvalidProgram, match=re.escape("rank 0, send.F c0 m1 rank1: deadlock: rank 1")):
        validate(program)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (Action(K.COMPUTE, 1, 0, "body"), "chunk 1 is not on this rank"),
        (Action(K.COMPUTE, 0, 9, "body"), "microbatch 9 does not go through this chunk"),
        (Action(K.COMPUTE, 0, 0, "nobody"), "the chunk has no item 'nobody'"),
        (Action(K.ISSUE, 0, 0, "body", Pass.FORWARD), "body is a phase"),
        (Action(K.SEND, 0, 0, direction=Pass.BACKWARD, peer=1), "no neighbouring chunk in this direction"),
        (Action(K.SEND, 0, 0, direction=Pass.FORWARD, peer=0), "chunk 1 is on rank 1"),
        (Action(K.HAND_OVER, 0, 0, direction=Pass.FORWARD), "chunk 1 is on rank 1"),
        (Action(K.RECOMPUTE, 0, 0, "body"), "already freed|not belong|drops nothing"),
    ],
)
def test_impossible_actions_name_their_reason(action: Action, reason: str) -> None:
    """Oracle: the reason written here by hand."""
    program = lower(make_schedule("1f1b", 2, 2), (dense_chunk(),) * 2)
    with pytest.raises(InvalidProgram, match=reason):
        validate(with_rank(program, 0, [action, *program.actions[0]]))


def test_lowering_refuses_broken_chunks() -> None:
    """Oracle: the reasons written here by hand."""
    schedule = make_schedule("1f1b", 2, 2)
    with pytest.raises(ValueError, match="3 chunks given, but the schedule lays out 2"):
        lower(schedule, (dense_chunk(),) * 3)
    items = dense_chunk().items
    broken = replace(dense_chunk(), items=(replace(items[0], reads=("nothing",)),))
    with pytest.raises(ValueError, match="body reads 'nothing'"):
        lower(schedule, (broken, dense_chunk()))
