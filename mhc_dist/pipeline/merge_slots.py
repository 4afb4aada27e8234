"""Which neighbouring slots of a rank may run side by side, although the schedule does not pair them.

While a pipeline fills and drains, passes run alone and their exchanges are exposed. Two of them can share
their windows if the second one's input is already there when the first one starts. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence

from mhc_dist.pipeline.action import ActionKind, Pass, Program
from mhc_dist.pipeline.clock import Message, message_of
from mhc_dist.pipeline.schedules.coarse import Op, OpKind
from mhc_dist.pipeline.simulate import Simulation

Group = tuple[Op, ...]
"""Passes of one rank that run side by side."""

TOLERANCE = 1e-9


def merge_slots(
    groups: Sequence[Sequence[Group]], program: Program, simulation: Simulation
) -> list[list[Group]]:
    """`groups` with neighbours joined where the run of `program` shows that nobody has to wait for it.

    Safe: in that run every input of a joined group was sent before the group started, by a group that
    started earlier. So the times of that run order the joined groups without a circle.
    """
    times = _Times(program, simulation)
    return [_merge_rank(own, times) for own in groups]


def _merge_rank(groups: Sequence[Group], times: _Times) -> list[Group]:
    result: list[Group] = []
    position = 0
    while position < len(groups):
        group = groups[position]
        partner = _partner(groups, position)
        if partner is None or not _may_join(group[0], groups[partner][0], times):
            result.append(group)
            position += 1
            continue
        result.append((group[0], groups[partner][0]))
        result += groups[position + 1 : partner]
        position = partner + 1
    return result


def _partner(groups: Sequence[Group], position: int) -> int | None:
    """The next single pass after a single pass; weight halves in between may wait for it."""
    if len(groups[position]) != 1 or groups[position][0].kind is OpKind.W:
        return None
    for other in range(position + 1, len(groups)):
        if len(groups[other]) != 1:
            return None
        if groups[other][0].kind is not OpKind.W:
            return other
    return None


def _may_join(first: Op, second: Op, times: _Times) -> bool:
    """Different chunks or different directions, so that sums over microbatches keep their order."""
    if first.microbatch == second.microbatch and abs(first.chunk - second.chunk) <= 1:
        return False
    both_backward = OpKind.F not in (first.kind, second.kind)
    if both_backward and first.chunk == second.chunk:
        return False
    return times.ready(second) <= times.start(first) + TOLERANCE


class _Times:
    """When passes started and when their inputs were there, in one simulated run."""

    def __init__(self, program: Program, simulation: Simulation) -> None:
        layout = program.layout
        self._layout = layout
        self._start: dict[Message, float] = {}
        self._landed: dict[Message, float] = {}
        for timeline in simulation.ranks:
            for done in timeline.actions:
                action = done.action
                match action.kind:
                    case ActionKind.COMPUTE:
                        self._start.setdefault((Pass.FORWARD, action.chunk, action.microbatch), done.start)
                    case ActionKind.GRADIENT:
                        self._start.setdefault((Pass.BACKWARD, action.chunk, action.microbatch), done.start)
                    case ActionKind.HAND_OVER:
                        self._landed[message_of(action)] = done.end
            for flight in timeline.flights:
                if flight.action.kind is ActionKind.SEND:
                    self._landed[message_of(flight.action)] = flight.end

    def start(self, op: Op) -> float:
        return self._start[_message(op)]

    def ready(self, op: Op) -> float:
        """When the input landed; the ends of the model need none."""
        direction, chunk, _ = _message(op)
        neighbour = self._layout.previous if direction is Pass.FORWARD else self._layout.next
        return 0.0 if neighbour(chunk) is None else self._landed[_message(op)]


def _message(op: Op) -> Message:
    direction = Pass.FORWARD if op.kind is OpKind.F else Pass.BACKWARD
    return (direction, op.chunk, op.microbatch)
