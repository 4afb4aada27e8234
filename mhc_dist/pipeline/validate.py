"""Proves a program safe before anything runs: an abstract interpreter over values, messages and exchanges.

It follows the rules of `action`, written out in `rules`, and knows nothing of how lowering or placement order
things:

* every phase, exchange and weight gradient happens exactly once, after what it needs and before FREE;
* the k-th SEND of each ordered pair of ranks matches the k-th RECV of its receiver;
* no rank waits for ever when a SEND completes only once the matching RECV is posted. Ranks are
  deterministic, so one completed run proves it for all speeds;
* every gradient is in place before REDUCE, and STEP comes last.

All ranks of an expert group run the same actions, so their exchanges agree by construction; that ranks hold
the same program is checked at run time by its digest. Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from mhc_dist.pipeline.action import Action, ActionKind, Pass, Program
from mhc_dist.pipeline.errors import InvalidProgram
from mhc_dist.pipeline.rules import FREED_BIT, Rule, rules_of, what_of

__all__ = ["InvalidProgram", "validate"]


def validate(program: Program) -> None:
    """Return if the program is safe; raise InvalidProgram naming rank, action and reason if not."""
    _check_layout(program)
    state = _State(program)
    ranks = [_RankInterpreter(program, rank, state) for rank in range(program.num_ranks)]
    progress = True
    while progress:
        progress = False
        for rank in ranks:
            progress |= rank.advance()
    for rank in ranks:
        rank.check_finished()


def _check_layout(program: Program) -> None:
    if len(program.chunks) != len(program.chunk_rank):
        raise ValueError(f"{len(program.chunks)} chunks for {len(program.chunk_rank)} entries of chunk_rank")
    if program.num_copies < 1 or len(program.chunk_rank) % program.num_copies:
        raise ValueError(f"{len(program.chunk_rank)} chunks cannot hold {program.num_copies} copies")
    if not all(0 <= rank < program.num_ranks for rank in program.chunk_rank):
        raise ValueError(f"chunk_rank {program.chunk_rank} names ranks outside 0..{program.num_ranks - 1}")


@dataclass(slots=True)
class _Channel:
    """One ordered pair of ranks: receives posted so far, in order, and how many sends have matched one."""

    posted: list[Action] = field(default_factory=list)
    num_sent: int = 0


class _State:
    """What all ranks share: the facts of every (chunk, microbatch), and the channels between ranks."""

    def __init__(self, program: Program) -> None:
        layout = program.layout
        self.rules = [
            rules_of(shape, chunk, program.chunk_rank, program.num_copies, program.training)
            for chunk, shape in enumerate(program.chunks)
        ]
        self.facts: list[dict[int, int]] = [
            dict.fromkeys(layout.microbatches(chunk), 0) for chunk in range(len(program.chunks))
        ]
        self.channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)


class _RankInterpreter:
    """One rank's actions, run until it must wait for another rank."""

    def __init__(self, program: Program, rank: int, state: _State) -> None:
        self._program = program
        self._rank = rank
        self._state = state
        self._actions = program.actions[rank]
        self._position = 0
        self._reduced = False
        self._stepped = False
        self._own = {
            chunk: (state.rules[chunk].by_what, state.facts[chunk])
            for chunk, owner in enumerate(program.chunk_rank)
            if owner == rank
        }

    def advance(self) -> bool:
        """Run on until blocked. Returns whether anything ran."""
        actions, own = self._actions, self._own
        start = self._position
        end = start
        for end in range(start, len(actions)):
            action = actions[end]
            chunk = own.get(action.chunk)
            if chunk is None:
                self._finish_step(action)
                continue
            by_what, facts = chunk
            rule = by_what.get((action.kind, action.item, action.direction, action.defer_weights))
            state = facts.get(action.microbatch)
            if (
                rule is None
                or state is None
                or rule.peer != action.peer
                or state & rule.needs != rule.needs
                or state & rule.bars
            ):
                raise InvalidProgram(self._rank, action, self._why_broken(action, rule, state))
            if rule.consumer is not None and not self._communicate(action, rule, state):
                break
            facts[action.microbatch] = state | rule.makes
        else:
            end = len(actions)
        self._position = end
        return end > start

    def _communicate(self, action: Action, rule: Rule, state: int) -> bool:
        """What a message does beyond its own chunk; False if it has to wait for its peer."""
        kind, peer, consumer = action.kind, rule.peer, rule.consumer
        assert consumer is not None
        if kind is ActionKind.ARRIVE:
            return bool(state & rule.there)
        if peer is not None:
            if kind is ActionKind.RECV:
                self._state.channels[peer, self._rank].posted.append(action)
                return True
            channel = self._state.channels[self._rank, peer]
            if channel.num_sent == len(channel.posted):
                return False
            self._check_order(action, consumer, channel.posted[channel.num_sent])
            channel.num_sent += 1
        self._state.facts[consumer][action.microbatch] |= rule.there
        return True

    def _check_order(self, action: Action, consumer: int, received: Action) -> None:
        """The receive that this SEND meets must be its own."""
        if (
            received.microbatch != action.microbatch
            or received.chunk != consumer
            or received.direction is not action.direction
        ):
            assert action.direction is not None
            assert action.peer is not None
            sent = _describe(action.direction, consumer, action.microbatch)
            reason = f"rank {self._rank} sends {sent} at this place of the channel"
            raise InvalidProgram(action.peer, received, reason)

    def _why_broken(self, action: Action, rule: Rule | None, state: int | None) -> str:
        rules = self._state.rules[action.chunk]
        if state is None:
            return f"microbatch {action.microbatch} does not go through this chunk"
        if rule is None or rule.peer != action.peer:
            return rules.why_impossible(action)
        if self._stepped or state & FREED_BIT:
            return f"chunk {action.chunk} microbatch {action.microbatch} is already freed"
        return rule.broken(state)

    def _finish_step(self, action: Action) -> None:
        """REDUCE and STEP; everything else names a chunk of this rank."""
        reason: str | None = None
        match action.kind:
            case ActionKind.REDUCE:
                reason = self._unfinished()
                if not self._program.training:
                    reason = "no gradients outside training"
                elif self._reduced:
                    reason = "gradients are already reduced"
                self._reduced = True
            case ActionKind.STEP:
                if not self._reduced:
                    reason = "gradients are not reduced yet"
                elif self._stepped:
                    reason = "nothing may follow the optimizer step"
                self._stepped = True
            case _:
                reason = f"chunk {action.chunk} is not on this rank"
        if reason is not None:
            raise InvalidProgram(self._rank, action, reason)

    def _unfinished(self) -> str | None:
        """The first microbatch of a chunk of this rank that is not freed."""
        for chunk, (_, facts) in self._own.items():
            for microbatch, state in facts.items():
                if not state & FREED_BIT:
                    return f"chunk {chunk} microbatch {microbatch} is not finished"
        return None

    def check_finished(self) -> None:
        """All actions ran and nothing is left over."""
        if self._position < len(self._actions):
            action = self._actions[self._position]
            raise InvalidProgram(self._rank, action, self._why_stuck(action))
        reason = self._unfinished()
        if reason is None and self._stepped != self._program.training:
            reason = "the optimizer step is missing"
        if reason is not None:
            raise InvalidProgram(self._rank, None, reason)

    def _why_stuck(self, action: Action) -> str:
        """The peer never answers, or waits itself."""
        rule = self._state.rules[action.chunk].by_what[what_of(action)]
        answer, doing = (
            (ActionKind.RECV, "posting the receive")
            if action.kind is ActionKind.SEND
            else (ActionKind.SEND, "sending it")
        )
        chunk = rule.consumer
        if action.kind is ActionKind.ARRIVE:
            chunk = action.chunk - 1 if action.direction is Pass.FORWARD else action.chunk + 1
        assert action.peer is not None
        if any(
            (a.kind, a.chunk, a.microbatch, a.direction)
            == (answer, chunk, action.microbatch, action.direction)
            for a in self._program.actions[action.peer]
        ):
            return f"deadlock: rank {action.peer} never gets to {doing}"
        verb = "receives" if action.kind is ActionKind.SEND else "sends"
        return f"rank {action.peer} never {verb} it"


def _describe(direction: Pass, chunk: int, microbatch: int) -> str:
    what = "the input" if direction is Pass.FORWARD else "the output gradient"
    return f"{what} of chunk {chunk} for microbatch {microbatch}"
