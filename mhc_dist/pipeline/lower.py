"""From coarse schedules to programs: every rank's fine-grained actions. Standard library only.

This lowering runs a pair's forward and backward one after the other; `place` interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable

from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Program
from mhc_dist.pipeline.flow import ChunkFlow
from mhc_dist.pipeline.lower_pass import BackwardPass, ForwardPass, weight_pass
from mhc_dist.pipeline.receives import post_receives
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot
from mhc_dist.pipeline.schedules.forward_only import forward_order

LowerOp = Callable[[Op], list[Action]]


def lower(schedule: CoarseSchedule, chunks: tuple[ChunkShape, ...], *, training: bool = True) -> Program:
    """Lower `schedule` over `chunks`. Without `training`, its backwards are left out."""
    layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
    _check_chunks(layout, chunks)
    lower_op = _op_lowering(layout, chunks)
    ranks: list[list[Action]] = []
    for slots in schedule.ranks:
        ops = [op for slot in slots for op in ops_of(slot) if training or op.kind is OpKind.F]
        actions = [action for op in ops for action in lower_op(op)]
        ranks.append(finish_rank(actions, training=training))
    return Program(
        schedule=schedule.name,
        num_microbatches=schedule.num_microbatches,
        chunk_rank=schedule.chunk_rank,
        chunks=chunks,
        actions=post_receives(ranks, layout, lead=1),
        training=training,
        num_copies=schedule.num_copies,
    )


def lower_evaluation(
    chunk_rank: tuple[int, ...], chunks: tuple[ChunkShape, ...], num_microbatches: int
) -> Program:
    """Forward only, in an order that keeps all ranks busy for any layout and any number of microbatches."""
    return lower(forward_order(chunk_rank, num_microbatches), chunks, training=False)


def ops_of(slot: Slot) -> tuple[Op, ...]:
    return (slot,) if isinstance(slot, Op) else (slot.forward, slot.backward)


def finish_rank(actions: list[Action], *, training: bool) -> list[Action]:
    """Add FREE after the last action of every (chunk, microbatch), then REDUCE and STEP."""
    last = {(action.chunk, action.microbatch): position for position, action in enumerate(actions)}
    result: list[Action] = []
    for position, action in enumerate(actions):
        result.append(action)
        if last[action.chunk, action.microbatch] == position:
            result.append(Action(ActionKind.FREE, action.chunk, action.microbatch))
    if training:
        result += [Action(ActionKind.REDUCE), Action(ActionKind.STEP)]
    return result


def _check_chunks(layout: Layout, chunks: tuple[ChunkShape, ...]) -> None:
    if len(chunks) != len(layout.chunk_rank):
        raise ValueError(f"{len(chunks)} chunks given, but the schedule lays out {len(layout.chunk_rank)}.")


def _op_lowering(layout: Layout, chunks: tuple[ChunkShape, ...]) -> LowerOp:
    flows = [ChunkFlow(shape) for shape in chunks]

    def lower_op(op: Op) -> list[Action]:
        flow = flows[op.chunk]
        match op.kind:
            case OpKind.F:
                return ForwardPass(flow, layout, op.chunk, op.microbatch).actions
            case OpKind.W:
                return weight_pass(flow, op.chunk, op.microbatch)
            case OpKind.B | OpKind.I:
                deferred = op.kind is OpKind.I
                return BackwardPass(flow, layout, op.chunk, op.microbatch, defer_weights=deferred).actions

    return lower_op
