"""Runs a program on virtual ranks: the time every action starts and ends, what is in flight, what is held.

The same program object that the executor runs. Rules, as there: one compute thread per rank; an exchange
flies from its ISSUE, on a lane that carries one thing at a time; a SEND returns at once and its transfer
begins when the receiver has posted; WAIT and ARRIVE block. Standard library only.

All ranks of an expert group run the same actions. Where they have the same costs, one stands for all. Where
the costs know how they differ (`Jitter`), they run side by side, each with durations of its own: an exchange
then lands when the last of them has delivered.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field

from mhc_dist.pipeline.action import Action, ActionKind, Pass, Program
from mhc_dist.pipeline.clock import Message, message_of
from mhc_dist.pipeline.cost import CostTable, bytes_at_end, bytes_at_start
from mhc_dist.pipeline.errors import InvalidProgram
from mhc_dist.pipeline.memory import SendBuffers
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.tempo import TempoCursor


@dataclass(frozen=True, slots=True)
class SimulatedAction:
    """When an action ran. `blocked` is the part of it spent waiting for a transfer that was on the wire;
    `starved` the part spent waiting for a peer that had not sent yet.
    """

    action: Action
    start: float
    end: float
    blocked: float = 0.0
    starved: float = 0.0


@dataclass(frozen=True, slots=True)
class Flight:
    """One transfer on a lane of a rank, from entering the lane to landing."""

    action: Action
    lane: str
    start: float
    end: float


@dataclass
class RankTimeline:
    """One rank's step."""

    actions: list[SimulatedAction] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """(time, bytes held from then on)"""

    @property
    def peak_bytes(self) -> int:
        return max((held for _, held in self.memory), default=0)

    @property
    def seconds(self) -> float:
        return self.actions[-1].end if self.actions else 0.0

    def busy(self, *kinds: ActionKind) -> float:
        return sum(a.end - a.start for a in self.actions if a.action.kind in kinds)

    def blocked(self, *kinds: ActionKind) -> float:
        return sum(a.blocked for a in self.actions if a.action.kind in kinds)


Exchange = tuple[int, int, str, Pass | None]
"""(chunk, microbatch, item, direction)"""


class _Rank:
    """Progress of one rank: a member of the expert group of pipeline rank `pipeline_rank`."""

    def __init__(
        self, pipeline_rank: int, member: int, actions: tuple[Action, ...], costs: CostTable
    ) -> None:
        self.pipeline_rank, self.member = pipeline_rank, member
        static_bytes = costs.static_bytes[pipeline_rank] if costs.static_bytes else 0
        self.pace = TempoCursor(costs.jitter.tempos[pipeline_rank][member]) if costs.jitter else None
        self.actions = actions
        self.sending = SendBuffers(costs)
        self.position = 0
        self.now = 0.0
        self.held = static_bytes
        self.lane_free: dict[str, float] = {}
        self.timeline = RankTimeline(memory=[(0.0, static_bytes)])

    def take(self, lane: str, earliest: float, seconds: float) -> tuple[float, float]:
        """Occupy a lane as soon as it is free."""
        start = max(earliest, self.lane_free.get(lane, 0.0))
        self.lane_free[lane] = start + seconds
        return start, start + seconds

    def hold(self, time: float, delta: int) -> None:
        if delta:
            self.held += delta
            self.timeline.memory.append((time, self.held))


class Simulation:
    """Simulate `program` under `costs`: results in `ranks`, the members of an expert group side by side."""

    def __init__(self, program: Program, costs: CostTable) -> None:
        self._program = program
        self._costs = costs
        self._num_members = costs.jitter.num_members if costs.jitter else 1
        self._ranks = [
            _Rank(pipeline_rank, member, actions, costs)
            for pipeline_rank, actions in enumerate(program.actions)
            for member in range(self._num_members)
        ]
        # By member of the group: messages stay among the ranks of one column.
        self._posted: dict[tuple[int, Message], float] = {}
        self._sent: dict[tuple[int, Message], tuple[float, int, Action]] = {}
        self._landed: dict[tuple[int, Message], float] = {}
        self._parked: dict[tuple[int, Message], int] = {}
        # When each member that has issued an exchange did so, and when its data lands; who waits for others.
        self._flying: dict[Exchange, list[tuple[float, float]]] = defaultdict(list)
        self._waiting: dict[Exchange, list[int]] = defaultdict(list)
        self._run()
        self.ranks = [rank.timeline for rank in self._ranks]

    @property
    def makespan(self) -> float:
        """Seconds of the step: the slowest rank."""
        return max(timeline.seconds for timeline in self.ranks)

    def _run(self) -> None:
        # The rank with the earliest clock goes first, so that lanes are taken in order of time.
        self._queue = [(0.0, index) for index in range(len(self._ranks))]
        while self._queue:
            _, index = heapq.heappop(self._queue)
            rank = self._ranks[index]
            running = rank.position < len(rank.actions)
            # Most actions take no time, so a rank often stays the earliest for a while.
            while running and (not self._queue or rank.now <= self._queue[0][0]):
                running = self._step(index, rank) and rank.position < len(rank.actions)
            if running:
                heapq.heappush(self._queue, (rank.now, index))
        for rank in self._ranks:
            if rank.position < len(rank.actions):
                action = rank.actions[rank.position]
                raise InvalidProgram(rank.pipeline_rank, action, "waits for ever")

    def _step(self, index: int, rank: _Rank) -> bool:
        """Run one action; False if the rank has to be woken by a transfer."""
        action = rank.actions[rank.position]
        start = rank.now
        blocked = starved = 0.0
        overhead = self._costs.overheads.get(action.kind, 0.0)
        if self._has_to_wait_for_others(index, rank, action):
            return False
        rank.hold(start, bytes_at_start(action, self._costs) + rank.sending.grow(action))
        match action.kind:
            case ActionKind.ISSUE:
                rank.now += overhead
                self._issue(rank, action)
            case ActionKind.WAIT:
                flights = self._flying[_exchange(action)]
                landed = max(start, *(landing for _, landing in flights))
                starved = max(0.0, min(landed, max(issued for issued, _ in flights)) - start)
                blocked = landed - start - starved
                # What a wait costs its thread by itself is over by the time that data land later.
                rank.now = max(landed, start + overhead)
            case ActionKind.SEND:
                rank.now += overhead
                message = (rank.member, message_of(action))
                self._sent[message] = (rank.now, index, action)
                self._match(message)
            case ActionKind.RECV:
                rank.now += overhead
                message = (rank.member, message_of(action))
                self._posted[message] = rank.now
                self._match(message)
            case ActionKind.ARRIVE:
                message = (rank.member, message_of(action))
                landing = self._landed.pop(message)
                sent = self._sent.pop(message)[0]
                landed = max(start, landing)
                starved = max(0.0, min(sent, landed) - start)
                blocked = landed - start - starved
                rank.now = max(landed, start + overhead)
            case _:
                rank.now = start + self._seconds(rank, action) + overhead
        rank.hold(rank.now, -bytes_at_end(action, self._costs, training=self._program.training))
        rank.timeline.actions.append(SimulatedAction(action, start, rank.now, blocked, starved))
        rank.position += 1
        if rank.position == len(rank.actions):
            rank.hold(rank.now, -rank.sending.held)
        return True

    def _has_to_wait_for_others(self, index: int, rank: _Rank, action: Action) -> bool:
        """True if `rank` cannot go on yet; whoever lets it go on puts it back into the queue."""
        if action.kind is ActionKind.ARRIVE:
            message = (rank.member, message_of(action))
            if message not in self._landed:
                self._parked[message] = index
                return True
        if action.kind is ActionKind.WAIT:
            exchange = _exchange(action)
            if len(self._flying[exchange]) < self._num_members:
                self._waiting[exchange].append(index)
                return True
        return False

    def _seconds(self, rank: _Rank, action: Action) -> float:
        seconds = self._costs.seconds(action)
        return rank.pace.seconds(seconds) if rank.pace and action.kind in COMPUTE_KINDS else seconds

    def _issue(self, rank: _Rank, action: Action) -> None:
        lane = self._costs.lane(action)
        start, end = rank.take(lane, rank.now, self._costs.wire_seconds(action))
        exchange = _exchange(action)
        self._flying[exchange].append((rank.now, end))
        rank.timeline.flights.append(Flight(action, lane, start, end))
        if len(self._flying[exchange]) == self._num_members:
            for index in self._waiting.pop(exchange, ()):
                heapq.heappush(self._queue, (max(end, self._ranks[index].now), index))

    def _match(self, message: tuple[int, Message]) -> None:
        """Start the transfer once it is sent and posted; wake whoever is parked for it."""
        if message not in self._sent or message not in self._posted:
            return
        sent, source, action = self._sent[message]
        cost = self._costs.message
        earliest = max(sent, self._posted.pop(message))
        start, end = self._ranks[source].take(cost.lane, earliest, cost.seconds)
        self._ranks[source].timeline.flights.append(Flight(action, cost.lane, start, end))
        self._landed[message] = end
        parked = self._parked.pop(message, None)
        if parked is not None:
            heapq.heappush(self._queue, (max(end, self._ranks[parked].now), parked))


def _exchange(action: Action) -> Exchange:
    return (action.chunk, action.microbatch, action.item, action.direction)
