"""From coarse schedules to programs: every rank's fine-grained actions. Standard library only.

This lowering runs a pair's forward and backward one after the other; `place` interleaves them.
"""

from __future__ import annotations

from mhc_dist.pipeline.action import Action, ActionKind, ChunkShape, Layout, Program
from mhc_dist.pipeline.lower_pass import passes_of
from mhc_dist.pipeline.receives import post_receives
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind, Slot
from mhc_dist.pipeline.schedules.forward_only import forward_order


def lower(schedule: CoarseSchedule, chunks: tuple[ChunkShape, ...], *, training: bool = True) -> Program:
    """Lower `schedule` over `chunks`. Without `training`, its backwards are left out."""
    layout = Layout(schedule.chunk_rank, schedule.num_microbatches, schedule.num_copies)
    _check_chunks(layout, chunks)
    passes = [
        passes_of(shape, chunk, schedule.chunk_rank, schedule.num_copies)
        for chunk, shape in enumerate(chunks)
    ]
    ranks: list[list[Action]] = []
    for slots in schedule.ranks:
        ops = [op for slot in slots for op in ops_of(slot) if training or op.kind is OpKind.F]
        last = {(op.chunk, op.microbatch): position for position, op in enumerate(ops)}
        actions: list[Action] = []
        for position, op in enumerate(ops):
            actions += passes[op.chunk].actions(op)
            if last[op.chunk, op.microbatch] == position:
                actions.append(passes[op.chunk].free(op.microbatch))
        ranks.append(actions + END_OF_STEP if training else actions)
    return Program(
        schedule=schedule.name,
        num_microbatches=schedule.num_microbatches,
        chunk_rank=schedule.chunk_rank,
        chunks=chunks,
        actions=post_receives(ranks, lead=1),
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


END_OF_STEP = [Action(ActionKind.REDUCE), Action(ActionKind.STEP)]


def _check_chunks(layout: Layout, chunks: tuple[ChunkShape, ...]) -> None:
    if len(chunks) != len(layout.chunk_rank):
        raise ValueError(f"{len(chunks)} chunks given, but the schedule lays out {len(layout.chunk_rank)}.")
