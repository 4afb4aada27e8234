"""Proves a program safe before anything runs: an abstract interpreter over values, messages and exchanges.

It follows the rules of `action` and knows nothing of how lowering or placement order things:

* every phase, exchange and weight gradient happens exactly once, after what it needs and before FREE;
* the k-th SEND of each ordered pair of ranks matches the k-th RECV of its receiver;
* no rank waits for ever when a SEND completes only once the matching RECV is posted. Ranks are
  deterministic, so one completed run proves it for all speeds;
* every gradient is in place before REDUCE, and STEP comes last.

All ranks of an expert group run the same actions, so their exchanges agree by construction; that ranks hold
the same program is checked at run time by its digest. Standard library only.
"""

from __future__ import annotations

from mhc_dist.pipeline.action import Action, ActionKind, Layout, Pass, Program
from mhc_dist.pipeline.clock import Message, message_of
from mhc_dist.pipeline.errors import InvalidProgram
from mhc_dist.pipeline.flow import ChunkFlow
from mhc_dist.pipeline.record import Broken, Record, require

__all__ = ["InvalidProgram", "validate"]

_MESSAGE_KINDS = frozenset({ActionKind.SEND, ActionKind.RECV, ActionKind.ARRIVE, ActionKind.HAND_OVER})


def validate(program: Program) -> None:
    """Return if the program is safe; raise InvalidProgram naming rank, action and reason if not."""
    _check_layout(program)
    interpreters = [_RankInterpreter(program, rank) for rank in range(program.num_ranks)]
    for interpreter in interpreters:
        interpreter.check_peers()
    _check_channels(program)
    posted: set[Message] = set()
    sent: set[Message] = set()
    progress = True
    while progress:
        progress = False
        for interpreter in interpreters:
            progress |= interpreter.advance(posted, sent)
    for interpreter in interpreters:
        interpreter.check_finished(posted, sent)


def _check_layout(program: Program) -> None:
    if len(program.chunks) != len(program.chunk_rank):
        raise ValueError(f"{len(program.chunks)} chunks for {len(program.chunk_rank)} entries of chunk_rank")
    if program.num_copies < 1 or len(program.chunk_rank) % program.num_copies:
        raise ValueError(f"{len(program.chunk_rank)} chunks cannot hold {program.num_copies} copies")
    if not all(0 <= rank < program.num_ranks for rank in program.chunk_rank):
        raise ValueError(f"chunk_rank {program.chunk_rank} names ranks outside 0..{program.num_ranks - 1}")


def _check_channels(program: Program) -> None:
    """Per ordered pair of ranks: sends and receives list the same transfers in the same order."""
    layout = program.layout
    sends: dict[tuple[int, int], list[tuple[Message, Action]]] = {}
    receives: dict[tuple[int, int], list[tuple[Message, Action]]] = {}
    for rank, actions in enumerate(program.actions):
        for action in actions:
            if action.kind is ActionKind.SEND and action.peer is not None:
                sends.setdefault((rank, action.peer), []).append((message_of(action, layout), action))
            elif action.kind is ActionKind.RECV and action.peer is not None:
                receives.setdefault((action.peer, rank), []).append((message_of(action, layout), action))
    for channel in sorted(sends.keys() | receives.keys()):
        source, destination = channel
        sending, receiving = sends.get(channel, []), receives.get(channel, [])
        for (sent, _), (received, recv) in zip(sending, receiving, strict=False):
            if sent != received:
                raise InvalidProgram(
                    destination,
                    recv,
                    f"rank {source} sends {_describe(sent)} at this place of the channel, not"
                    f" {_describe(received)}",
                )
        if len(sending) > len(receiving):
            raise InvalidProgram(source, sending[len(receiving)][1], f"rank {destination} never receives it")
        if len(receiving) > len(sending):
            raise InvalidProgram(destination, receiving[len(sending)][1], f"rank {source} never sends it")


def _describe(message: Message) -> str:
    direction, chunk, microbatch = message
    what = "the input" if direction is Pass.FORWARD else "the output gradient"
    return f"{what} of chunk {chunk} for microbatch {microbatch}"


class _RankInterpreter:
    """One rank's actions, run until it must wait for another rank."""

    def __init__(self, program: Program, rank: int) -> None:
        self._program = program
        self._layout: Layout = program.layout
        self._rank = rank
        self._actions = program.actions[rank]
        self._position = 0
        self._records: dict[tuple[int, int], Record] = {}
        self._freed: set[tuple[int, int]] = set()
        self._posted_here: set[Message] = set()
        self._arrived: set[Message] = set()
        self._reduced = False
        self._stepped = False
        self._flows = {
            chunk: ChunkFlow(program.chunks[chunk])
            for chunk, owner in enumerate(program.chunk_rank)
            if owner == rank
        }

    def check_peers(self) -> None:
        """Messages name chunks of this rank and the rank that owns the neighbouring chunk."""
        for action in self._actions:
            if action.kind not in (ActionKind.REDUCE, ActionKind.STEP):
                if action.chunk not in self._flows:
                    raise InvalidProgram(self._rank, action, f"chunk {action.chunk} is not on this rank")
                if action.microbatch not in self._layout.microbatches(action.chunk):
                    raise InvalidProgram(
                        self._rank, action, f"microbatch {action.microbatch} does not go through this chunk"
                    )
            if action.kind in _MESSAGE_KINDS:
                self._check_peer(action)

    def _check_peer(self, action: Action) -> None:
        if action.direction is None:
            raise InvalidProgram(self._rank, action, "a message needs a direction")
        leaving = action.kind in (ActionKind.SEND, ActionKind.HAND_OVER)
        downstream = leaving == (action.direction is Pass.FORWARD)
        other = self._layout.next(action.chunk) if downstream else self._layout.previous(action.chunk)
        if other is None:
            raise InvalidProgram(self._rank, action, "there is no neighbouring chunk in this direction")
        owner = self._layout.chunk_rank[other]
        expected = None if action.kind is ActionKind.HAND_OVER else owner
        if (owner == self._rank) != (action.kind is ActionKind.HAND_OVER) or action.peer != expected:
            raise InvalidProgram(self._rank, action, f"chunk {other} is on rank {owner}")

    def advance(self, posted: set[Message], sent: set[Message]) -> bool:
        """Run on until blocked. Returns whether anything ran."""
        start = self._position
        while self._position < len(self._actions):
            action = self._actions[self._position]
            if self._blocked_by(action, posted, sent) is not None:
                break
            try:
                self._apply(action, posted, sent)
            except Broken as broken:
                raise InvalidProgram(self._rank, action, str(broken)) from None
            self._position += 1
        return self._position > start

    def _blocked_by(self, action: Action, posted: set[Message], sent: set[Message]) -> str | None:
        """Why the action cannot complete yet; None when it can."""
        if action.kind is ActionKind.SEND and message_of(action, self._layout) not in posted:
            return f"rank {action.peer} never gets to posting the receive"
        if action.kind is ActionKind.ARRIVE:
            message = message_of(action, self._layout)
            if message in self._posted_here and message not in sent:
                return f"rank {action.peer} never gets to sending it"
        return None

    def _apply(self, action: Action, posted: set[Message], sent: set[Message]) -> None:
        require(not self._stepped, "nothing may follow the optimizer step")
        match action.kind:
            case ActionKind.REDUCE:
                require(self._program.training, "no gradients outside training")
                require(not self._reduced, "gradients are already reduced")
                self._require_all_freed()
                self._reduced = True
            case ActionKind.STEP:
                require(self._reduced, "gradients are not reduced yet")
                self._stepped = True
            case ActionKind.RECV:
                require(not self._reduced, "nothing may be received after gradients are reduced")
                message = message_of(action, self._layout)
                require((action.chunk, action.microbatch) not in self._freed, "already freed")
                require(message not in self._posted_here, "already posted")
                self._posted_here.add(message)
                posted.add(message)
            case _:
                self._apply_to_record(action, sent)

    def _apply_to_record(self, action: Action, sent: set[Message]) -> None:
        record = self._record(action.chunk, action.microbatch)
        match action.kind:
            case ActionKind.SEND:
                assert action.direction is not None
                record.leave(action.direction)
                sent.add(message_of(action, self._layout))
            case ActionKind.ARRIVE:
                assert action.direction is not None
                message = message_of(action, self._layout)
                require(message in self._posted_here, "its receive was not posted")
                record.enter(action.direction)
                self._arrived.add(message)
            case ActionKind.HAND_OVER:
                assert action.direction is not None
                record.leave(action.direction)
                direction, chunk, microbatch = message_of(action, self._layout)
                self._record(chunk, microbatch).enter(direction)
            case ActionKind.FREE:
                record.apply(action)
                del self._records[action.chunk, action.microbatch]
                self._freed.add((action.chunk, action.microbatch))
            case _:
                record.apply(action)

    def _record(self, chunk: int, microbatch: int) -> Record:
        key = (chunk, microbatch)
        require(key not in self._freed, f"chunk {chunk} microbatch {microbatch} is already freed")
        if key not in self._records:
            self._records[key] = Record(
                self._flows[chunk],
                is_first=self._layout.previous(chunk) is None,
                is_last=self._layout.next(chunk) is None,
                training=self._program.training,
            )
        return self._records[key]

    def _require_all_freed(self) -> None:
        for chunk in self._flows:
            for microbatch in self._layout.microbatches(chunk):
                freed = (chunk, microbatch) in self._freed
                require(freed, f"chunk {chunk} microbatch {microbatch} is not finished")

    def check_finished(self, posted: set[Message], sent: set[Message]) -> None:
        """All actions ran and nothing is left over."""
        if self._position < len(self._actions):
            action = self._actions[self._position]
            reason = self._blocked_by(action, posted, sent)
            assert reason is not None
            raise InvalidProgram(self._rank, action, f"deadlock: {reason}")
        try:
            self._require_all_freed()
            require(self._stepped == self._program.training, "the optimizer step is missing")
            require(self._posted_here == self._arrived, "a posted receive is never completed")
        except Broken as broken:
            raise InvalidProgram(self._rank, None, str(broken)) from None
