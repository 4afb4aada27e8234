"""Runs per-rank action lists on a virtual clock: when does each action end? Standard library only.

Ranks are deterministic and talk only through messages, so running any rank that can run, in any order,
always gives the same times. That also means: if this run completes, every run completes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.errors import InvalidProgram

Message = tuple[Pass, int, int]
"""(direction, consuming chunk, microbatch): names one transfer between pipeline ranks."""

# Enum members looked up once: a program asks for millions of messages.
_SEND, _ARRIVE, _HAND_OVER = ActionKind.SEND, ActionKind.ARRIVE, ActionKind.HAND_OVER
_ISSUE, _WAIT, _FORWARD = ActionKind.ISSUE, ActionKind.WAIT, Pass.FORWARD


def message_of(action: Action) -> Message:
    """The transfer that a SEND, RECV, ARRIVE or HAND_OVER belongs to."""
    direction, kind, chunk = action.direction, action.kind, action.chunk
    assert direction is not None, f"{action} has no direction"
    if kind is _SEND or kind is _HAND_OVER:
        chunk += 1 if direction is _FORWARD else -1  # neighbours in the model have neighbouring numbers
    return (direction, chunk, action.microbatch)


@dataclass(frozen=True)
class Times:
    """End of every action, by rank and position; `sent[message]` is when a transfer left."""

    ends: list[list[int]]
    sent: dict[Message, int]


def run_clock(
    ranks: Sequence[Sequence[Action]],
    duration: Callable[[Action], int],
    wire: Callable[[Action], int],
) -> Times:
    """Run with free buffering: a SEND never blocks, an ARRIVE waits for its SEND.

    `duration` is in ticks, at least 1 for every compute action and 0 for everything else; `wire` is how long
    an issued exchange is in flight.
    Raises InvalidProgram, naming rank and action, when the ranks wait for each other for ever.
    """
    ends: list[list[int]] = [[] for _ in ranks]
    sent: dict[Message, int] = {}
    landing: dict[tuple[int, int, str, Pass | None], int] = {}
    progress = True
    while progress:
        progress = False
        for actions, done in zip(ranks, ends, strict=True):
            first = len(done)
            now = done[-1] if done else 0
            for position in range(first, len(actions)):
                action = actions[position]
                kind = action.kind
                if kind is _ARRIVE:
                    arrival = sent.get(message_of(action))
                    if arrival is None:
                        break
                    if arrival > now:
                        now = arrival
                elif kind is _SEND:
                    sent[message_of(action)] = now
                elif kind is _ISSUE:
                    key = (action.chunk, action.microbatch, action.item, action.direction)
                    landing[key] = now + wire(action)
                elif kind is _WAIT:
                    key = (action.chunk, action.microbatch, action.item, action.direction)
                    now = max(now, landing[key])
                else:
                    now += duration(action)
                done.append(now)
            progress |= len(done) > first
    for rank, (actions, done) in enumerate(zip(ranks, ends, strict=True)):
        if len(done) < len(actions):
            raise InvalidProgram(rank, actions[len(done)], "waits for a message that can never be sent")
    return Times(ends, sent)
