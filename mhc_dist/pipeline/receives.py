"""Where each rank posts its receives. Standard library only.

A SEND completes only once its receiver has posted the matching RECV, and the transfers of one ordered pair
of ranks match in order. So receives must be posted in the order of the sends, and early enough.

The rule: run the program on a virtual clock with free buffering; a transfer that leaves at time t is posted
right after the last compute action that its receiver has finished at or before t. Then the free-buffering
run is also a run in which no SEND ever blocks: at time t the receiver has reached that point, because
posting itself does not block. One completed run proves freedom from deadlock at any speed, because ranks
are deterministic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from mhc_dist.pipeline.action import Action, ActionKind, Layout
from mhc_dist.pipeline.clock import message_of, run_clock

COMPUTE_KINDS = frozenset({ActionKind.COMPUTE, ActionKind.GRADIENT, ActionKind.WEIGHT, ActionKind.RECOMPUTE})


def unit_ticks(action: Action) -> int:
    """Durations good enough to order receives: a full backward of a phase costs two forwards."""
    if action.kind not in COMPUTE_KINDS:
        return 0
    return 2 if action.kind is ActionKind.GRADIENT and not action.defer_weights else 1


def no_ticks(action: Action) -> int:
    """Exchanges on the clock of `unit_ticks`: over at once."""
    return 0


def post_receives(
    ranks: Sequence[Sequence[Action]],
    layout: Layout,
    duration: Callable[[Action], int] = unit_ticks,
    wire: Callable[[Action], int] = no_ticks,
    lead: int = 0,
) -> tuple[tuple[Action, ...], ...]:
    """`ranks` with a RECV for every ARRIVE. Raises InvalidProgram if the ranks wait in a circle.

    With `lead`, each receive is posted that many compute actions earlier than the rule needs, so that a
    sender that is somewhat faster than the clock said does not wait; it costs buffers.
    """
    times = run_clock(ranks, layout, duration, wire)
    # finished[r]: (time, position after it) of each compute action of rank r, in order.
    finished: list[list[tuple[int, int]]] = [
        [
            (end, position + 1)
            for position, (action, end) in enumerate(zip(actions, ends, strict=True))
            if action.kind in COMPUTE_KINDS
        ]
        for actions, ends in zip(ranks, times.ends, strict=True)
    ]
    arrivals = {
        message_of(action, layout): (rank, action)
        for rank, actions in enumerate(ranks)
        for action in actions
        if action.kind is ActionKind.ARRIVE
    }
    # posts[r][position]: receives to post in front of that action, in the order of their sends.
    posts: list[dict[int, list[tuple[int, int, Action]]]] = [{} for _ in ranks]
    for source, actions in enumerate(ranks):
        for action in actions:
            if action.kind is ActionKind.SEND:
                message = message_of(action, layout)
                sent = times.sent[message]
                rank, arrive = arrivals[message]
                index = bisect_right(finished[rank], sent, key=lambda pair: pair[0])
                index = max(0, index - lead)
                position = finished[rank][index - 1][1] if index else 0
                recv = Action(
                    ActionKind.RECV, arrive.chunk, arrive.microbatch, direction=arrive.direction, peer=source
                )
                posts[rank].setdefault(position, []).append((sent, source, recv))
    result: list[tuple[Action, ...]] = []
    for actions, post in zip(ranks, posts, strict=True):
        merged: list[Action] = []
        for position, action in enumerate(actions):
            # A stable sort keeps the order of one channel where times tie.
            merged.extend(recv for _, _, recv in sorted(post.get(position, ()), key=lambda p: p[:2]))
            merged.append(action)
        result.append(tuple(merged))
    return tuple(result)
