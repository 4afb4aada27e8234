"""What one rank did in one step, action by action. Standard library only."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mhc_dist.pipeline.action import Action, ActionKind, Pass


class StepPhase(StrEnum):
    """Where wall time goes; exclusive, so the seconds of a step add up to its wall time."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT_GRADIENT = "weight_grad"
    RECOMPUTE = "recompute"
    EXPOSED_ALL_TO_ALL = "exposed_all_to_all"
    EXPOSED_P2P = "exposed_p2p"
    BUBBLE = "bubble"
    """Waiting for another rank that was not ready: nothing of what is awaited was on its way yet."""
    OPTIMIZER = "optimizer"
    DATA = "data"
    CHECKPOINT = "checkpoint"
    OTHER = "other"


# What an action's time counts as, apart from the part in which it was starved: that is BUBBLE.
PHASE_OF_KIND = {
    ActionKind.COMPUTE: StepPhase.FORWARD,
    ActionKind.GRADIENT: StepPhase.BACKWARD,
    ActionKind.WEIGHT: StepPhase.WEIGHT_GRADIENT,
    ActionKind.RECOMPUTE: StepPhase.RECOMPUTE,
    ActionKind.ISSUE: StepPhase.EXPOSED_ALL_TO_ALL,
    ActionKind.WAIT: StepPhase.EXPOSED_ALL_TO_ALL,
    ActionKind.SEND: StepPhase.EXPOSED_P2P,
    ActionKind.RECV: StepPhase.EXPOSED_P2P,
    ActionKind.ARRIVE: StepPhase.EXPOSED_P2P,
    ActionKind.HAND_OVER: StepPhase.OTHER,
    ActionKind.FREE: StepPhase.OTHER,
    ActionKind.REDUCE: StepPhase.OPTIMIZER,
    ActionKind.STEP: StepPhase.OPTIMIZER,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One executed action, in seconds of the rank's monotonic clock.

    payload_bytes: left this rank for others (ISSUE, SEND) or came from them (WAIT, ARRIVE). `starved` and
    `blocked` are parts of the action's time, in this order: waiting for another rank that had not begun, and
    for data on the wire (`wire.py` says how they are told apart).
    """

    action: Action
    start: float
    end: float
    payload_bytes: int = 0
    blocked: float = 0.0
    starved: float = 0.0

    @property
    def seconds(self) -> float:
        return self.end - self.start


def awaited_action(action: Action) -> Action | None:
    """What another rank has to do before `action` can end; None if it waits for none.

    ARRIVE waits for the SEND of its peer (whose own peer is left out); WAIT for the ISSUE of the same
    exchange by the other ranks of the expert group, of which the last one decides.
    """
    match action.kind:
        case ActionKind.ARRIVE:
            step = 1 if action.direction is Pass.FORWARD else -1
            return replace(action, kind=ActionKind.SEND, chunk=action.chunk - step, peer=None)
        case ActionKind.WAIT:
            return replace(action, kind=ActionKind.ISSUE)
        case _:
            return None


@dataclass
class Trace:
    """The events of one run of a program on one rank, in order.

    began, ended: the whole run, with what surrounds the events; by default the first and the last of them.
    """

    events: list[Event] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None

    @property
    def seconds(self) -> float:
        if not self.events:
            return 0.0
        began = self.events[0].start if self.began is None else self.began
        return (self.events[-1].end if self.ended is None else self.ended) - began

    def phase_seconds(self) -> dict[StepPhase, float]:
        """Seconds per phase. Time between actions is `other`, so the sum is the trace's wall time."""
        seconds: dict[StepPhase, float] = defaultdict(float)
        for event in self.events:
            seconds[PHASE_OF_KIND[event.action.kind]] += event.seconds - event.starved
            seconds[StepPhase.BUBBLE] += event.starved
        seconds[StepPhase.OTHER] += self.seconds - sum(seconds.values())
        return dict(seconds)

    def payload_bytes(self) -> dict[str, int]:
        """Bytes sent to other ranks, by kind of communication."""
        sent = {"all_to_all": 0, "p2p": 0}
        for event in self.events:
            if event.action.kind is ActionKind.ISSUE:
                sent["all_to_all"] += event.payload_bytes
            elif event.action.kind is ActionKind.SEND:
                sent["p2p"] += event.payload_bytes
        return sent

    def exchange_seconds(self) -> float:
        """Seconds from each exchange's issue to the end of its wait: in flight, hidden or not."""
        issued: dict[tuple[int, int, str, Pass | None], float] = {}
        total = 0.0
        for event in self.events:
            a = event.action
            key = (a.chunk, a.microbatch, a.item, a.direction)
            if a.kind is ActionKind.ISSUE:
                issued[key] = event.start
            elif a.kind is ActionKind.WAIT:
                total += event.end - issued.pop(key)
        return total
