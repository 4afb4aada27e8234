"""When passes started, and when their inputs were there, in one simulated run. Standard library only."""

from __future__ import annotations

from mhc_dist.pipeline.action import ActionKind, Pass, Program
from mhc_dist.pipeline.clock import Message, message_of
from mhc_dist.pipeline.schedules.coarse import Op, OpKind
from mhc_dist.pipeline.simulate import Simulation


class RunTimes:
    """Seconds of `simulation`, a run of `program`."""

    def __init__(self, program: Program, simulation: Simulation) -> None:
        layout = program.layout
        self._layout = layout
        self._start: dict[Message, float] = {}
        self._end: dict[Message, float] = {}
        self._landed: dict[Message, float] = {}
        for timeline in simulation.ranks:
            for done in timeline.actions:
                action = done.action
                match action.kind:
                    case ActionKind.COMPUTE | ActionKind.GRADIENT:
                        direction = Pass.FORWARD if action.kind is ActionKind.COMPUTE else Pass.BACKWARD
                        key = (direction, action.chunk, action.microbatch)
                        self._start.setdefault(key, done.start)
                        self._end[key] = done.end
                    case ActionKind.HAND_OVER:
                        self._landed[message_of(action)] = done.end
            for flight in timeline.flights:
                if flight.action.kind is ActionKind.SEND:
                    self._landed[message_of(flight.action)] = flight.end

    def start(self, op: Op) -> float:
        return self._start[_message(op)]

    def end(self, op: Op) -> float:
        """Of its last phase, weight gradients aside."""
        return self._end[_message(op)]

    def ready(self, op: Op) -> float:
        """When the input landed; the ends of the model need none."""
        direction, chunk, _ = _message(op)
        neighbour = self._layout.previous if direction is Pass.FORWARD else self._layout.next
        return 0.0 if neighbour(chunk) is None else self._landed[_message(op)]


def _message(op: Op) -> Message:
    direction = Pass.FORWARD if op.kind is OpKind.F else Pass.BACKWARD
    return (direction, op.chunk, op.microbatch)
