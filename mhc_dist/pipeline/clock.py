"""Runs per-rank action lists on a virtual clock: when does each action end? Standard library only.

Ranks are deterministic and talk only through messages, so running any rank that can run, in any order,
always gives the same times. That also means: if this run completes, every run completes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mhc_dist.pipeline.action import Action, ActionKind, Layout, Pass
from mhc_dist.pipeline.errors import InvalidProgram

Message = tuple[Pass, int, int]
"""(direction, consuming chunk, microbatch): names one transfer between pipeline ranks."""


def message_of(action: Action, layout: Layout) -> Message:
    """The transfer that a SEND, RECV, ARRIVE or HAND_OVER belongs to."""
    assert action.direction is not None, f"{action} has no direction"
    chunk: int | None = action.chunk
    if action.kind in (ActionKind.SEND, ActionKind.HAND_OVER):
        neighbour = layout.next if action.direction is Pass.FORWARD else layout.previous
        chunk = neighbour(action.chunk)
        assert chunk is not None, f"{action} leaves the model"
    assert chunk is not None
    return (action.direction, chunk, action.microbatch)


@dataclass(frozen=True)
class Times:
    """End of every action, by rank and position; `sent[message]` is when a transfer left."""

    ends: list[list[int]]
    sent: dict[Message, int]


def run_clock(
    ranks: Sequence[Sequence[Action]],
    layout: Layout,
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
            now = done[-1] if done else 0
            while len(done) < len(actions):
                action = actions[len(done)]
                if action.kind is ActionKind.ARRIVE:
                    arrival = sent.get(message_of(action, layout))
                    if arrival is None:
                        break
                    now = max(now, arrival)
                elif action.kind is ActionKind.SEND:
                    sent[message_of(action, layout)] = now
                elif action.kind is ActionKind.ISSUE:
                    key = (action.chunk, action.microbatch, action.item, action.direction)
                    landing[key] = now + wire(action)
                elif action.kind is ActionKind.WAIT:
                    key = (action.chunk, action.microbatch, action.item, action.direction)
                    now = max(now, landing[key])
                else:
                    now += duration(action)
                done.append(now)
                progress = True
    for rank, (actions, done) in enumerate(zip(ranks, ends, strict=True)):
        if len(done) < len(actions):
            raise InvalidProgram(rank, actions[len(done)], "waits for a message that can never be sent")
    return Times(ends, sent)
