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
from functools import lru_cache
from operator import itemgetter

from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.clock import Message, message_of, run_clock

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
    duration: Callable[[Action], int] = unit_ticks,
    wire: Callable[[Action], int] = no_ticks,
    lead: int = 0,
) -> tuple[tuple[Action, ...], ...]:
    """`ranks` with a RECV for every ARRIVE. Raises InvalidProgram if the ranks wait in a circle.

    With `lead`, each receive is posted that many compute actions earlier than the rule needs, so that a
    sender that is somewhat faster than the clock said does not wait; it costs buffers.
    """
    times = run_clock(ranks, duration, wire)
    # finished[r]: when the compute actions of rank r end, in order; after[r]: the positions behind them.
    finished: list[list[int]] = []
    after: list[list[int]] = []
    for actions, ends in zip(ranks, times.ends, strict=True):
        positions = [p for p, action in enumerate(actions, 1) if action.kind in COMPUTE_KINDS]
        finished.append([ends[p - 1] for p in positions])
        after.append(positions)
    # posts[r][position]: receives to post in front of that action, in the order of their sends.
    posts: list[dict[int, list[tuple[int, int, Action]]]] = [{} for _ in ranks]
    for source, actions in enumerate(ranks):
        for action in actions:
            if action.kind is _SEND:
                message = message_of(action)
                sent = times.sent[message]
                rank = action.peer
                assert rank is not None, f"{action} has no peer"
                index = max(0, bisect_right(finished[rank], sent) - lead)
                position = after[rank][index - 1] if index else 0
                posts[rank].setdefault(position, []).append((sent, source, _receive(message, source)))
    result: list[tuple[Action, ...]] = []
    for actions, post in zip(ranks, posts, strict=True):
        merged: list[Action] = []
        done = 0
        for position in sorted(post):
            merged += actions[done:position]
            # A stable sort keeps the order of one channel where times tie.
            merged += [recv for _, _, recv in sorted(post[position], key=_TIME_AND_SOURCE)]
            done = position
        result.append((*merged, *actions[done:]))
    return tuple(result)


_SEND = ActionKind.SEND
_TIME_AND_SOURCE = itemgetter(0, 1)


@lru_cache(maxsize=1 << 14)
def _receive(message: Message, source: int) -> Action:
    """Shared between programs: making an action costs more than finding it."""
    direction, chunk, microbatch = message
    return Action(ActionKind.RECV, chunk, microbatch, direction=direction, peer=source)
