"""What every action of a chunk needs and leaves behind: one integer per (chunk, microbatch), a bit per fact.

Facts only ever become true, so an action is checked with two masks and recorded with a third. Which fact is
missing is worked out only once a check fails. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    Action,
    ActionKind,
    ChunkShape,
    ExchangeShape,
    Layout,
    Pass,
    PhaseShape,
)
from mhc_dist.pipeline.flow import ChunkFlow

What = tuple[ActionKind, str, Pass | None, bool]
"""Everything that says what an action does, but not to which microbatch: kind, item, direction, defer."""

Fact = tuple[str, str]
"""("computed", phase), ("awaited.B", exchange), ("left.F", ""): becomes true once."""

FREED: Fact = ("freed", "")


def came(direction: Pass) -> Fact:
    """The input (F) or the gradient of the output (B) is here."""
    return (f"came.{direction.value}", "")


def landed(direction: Pass) -> Fact:
    """Another rank has sent it."""
    return (f"landed.{direction.value}", "")


COMMON = (FREED, came(Pass.FORWARD), came(Pass.BACKWARD), landed(Pass.FORWARD), landed(Pass.BACKWARD))
"""Facts that have the same bit in every chunk, because other chunks make them true."""

FREED_BIT = 1


def what_of(action: Action) -> What:
    return (action.kind, action.item, action.direction, action.defer_weights)


@dataclass(frozen=True, slots=True)
class Rule:
    """Masks over the facts of one (chunk, microbatch). `conditions`: (mask, wanted, reason), in the order in
    which they are explained. A message has the rank at its other end (`peer`), the chunk that receives it,
    and the fact there that sending makes true, or that arriving waits for.
    """

    needs: int
    bars: int
    makes: int
    conditions: tuple[tuple[int, bool, str], ...]
    peer: int | None = None
    consumer: int | None = None
    there: int = 0

    def broken(self, state: int) -> str:
        """Why the action may not run in `state`; one of its conditions must be broken."""
        return next(
            reason for mask, wanted, reason in self.conditions if (state & mask == mask) is not wanted
        )


class ChunkRules:
    """The rule of every action that one chunk allows: `by_what[kind, item, direction, defer_weights]`."""

    def __init__(self, shape: ChunkShape, layout: Layout, chunk: int, *, training: bool) -> None:
        self.by_what: dict[What, Rule] = {}
        self._flow = ChunkFlow(shape)
        self._layout = layout
        self._chunk = chunk
        self._training = training
        self._facts = {fact: 1 << position for position, fact in enumerate(COMMON)}
        for phase in self._flow.phases:
            self._phase(phase)
        for exchange in self._flow.exchanges:
            self._exchange(exchange)
        for direction in Pass:
            if training or direction is Pass.FORWARD:
                self._messages(direction)
        self._free()

    def _bit(self, *facts: Fact) -> int:
        """The mask of `facts`."""
        mask = 0
        for fact in facts:
            mask |= self._facts.setdefault(fact, 1 << len(self._facts))
        return mask

    def why_impossible(self, action: Action) -> str:
        """The reason why no rule allows `action` in this chunk, whatever has happened before."""
        item = self._flow.items.get(action.item)
        match action.kind:
            case ActionKind.SEND | ActionKind.HAND_OVER | ActionKind.RECV | ActionKind.ARRIVE:
                return self._why_no_message(action)
            case ActionKind.COMPUTE | ActionKind.GRADIENT | ActionKind.WEIGHT | ActionKind.RECOMPUTE:
                if isinstance(item, ExchangeShape):
                    return f"{item.name} is an exchange: it is issued and awaited, not computed"
            case ActionKind.ISSUE | ActionKind.WAIT:
                if isinstance(item, PhaseShape):
                    return f"{item.name} is a phase: it is computed, not issued or awaited"
                if action.direction is None:
                    return "an exchange needs a direction"
            case _:
                return "this kind of action does not belong to a chunk's dataflow"
        if item is None:
            return f"the chunk has no item {action.item!r}"
        if action.kind is ActionKind.RECOMPUTE and isinstance(item, PhaseShape) and not item.drops:
            return "the phase drops nothing"
        if not self._training:
            return "no backward outside training"
        if isinstance(item, ExchangeShape):
            return "the exchange has no backward"
        return "the phase has no weight gradients to put off"

    def _why_no_message(self, action: Action) -> str:
        if action.direction is None:
            return "a message needs a direction"
        other = self._neighbour(action.direction, leaving=action.kind in _LEAVING)
        if other is None:
            return "there is no neighbouring chunk in this direction"
        owner = self._layout.chunk_rank[other]
        here = owner == self._layout.chunk_rank[self._chunk]
        if here == (action.kind is ActionKind.HAND_OVER) and action.peer == (None if here else owner):
            return "no backward outside training"
        return f"chunk {other} is on rank {owner}"

    def _neighbour(self, direction: Pass, *, leaving: bool) -> int | None:
        downstream = leaving == (direction is Pass.FORWARD)
        return (self._layout.next if downstream else self._layout.previous)(self._chunk)

    def _add(
        self,
        what: What,
        conditions: Iterable[tuple[int, bool, str]],
        makes: int,
        *,
        peer: int | None = None,
        consumer: int | None = None,
        there: int = 0,
    ) -> None:
        checked = ((FREED_BIT, False, "already freed"), *(c for c in conditions if c[0]))
        needs = bars = 0
        for mask, wanted, _ in checked:
            if wanted:
                needs |= mask
            else:
                assert mask.bit_count() == 1, "a barred mask is one fact"
                bars |= mask
        self.by_what[what] = Rule(needs, bars, makes, checked, peer, consumer, there)

    def _value(self, value: str) -> int:
        """The fact that a value exists; 0 for what is there from the start."""
        if value == CHUNK_INPUT:
            return (
                self._bit(came(Pass.FORWARD))
                if self._neighbour(Pass.BACKWARD, leaving=True) is not None
                else 0
            )
        if value == CHUNK_TARGETS:
            return 0
        writer = self._flow.writer[value]
        kind = "computed" if isinstance(writer, PhaseShape) else "awaited.F"
        return self._bit((kind, writer.name))

    def _gradient(self, value: str) -> int:
        """The facts that make the gradient of a value complete: every reader has contributed."""
        mask = 0
        for reader in self._flow.gradient_readers[value]:
            kind = "gradient" if isinstance(reader, PhaseShape) else "awaited.B"
            mask |= self._bit((kind, reader.name))
        if value == CHUNK_OUTPUT and self._neighbour(Pass.FORWARD, leaving=True) is not None:
            mask |= self._bit(came(Pass.BACKWARD))
        return mask

    def _values(self, values: Iterable[str]) -> list[tuple[int, bool, str]]:
        return [(self._value(value), True, f"{value} not available yet") for value in values]

    def _gradients(self, values: Iterable[str]) -> list[tuple[int, bool, str]]:
        return [(self._gradient(value), True, f"gradient of {value} not complete yet") for value in values]

    def _phase(self, phase: PhaseShape) -> None:
        name = phase.name
        computed, gradient = self._bit(("computed", name)), self._bit(("gradient", name))
        weights, recomputed = self._bit(("weights", name)), self._bit(("recomputed", name))
        self._add(
            (ActionKind.COMPUTE, name, None, False),
            [(computed, False, "already computed"), *self._values(phase.reads)],
            computed,
        )
        if not self._training:
            return
        before = [
            (computed, True, "its forward has not run"),
            (gradient, False, "its backward has already run"),
            (recomputed if phase.drops else 0, True, "what it dropped was not recomputed"),
            *self._gradients(phase.writes),
        ]
        self._add((ActionKind.GRADIENT, name, None, False), before, gradient | weights)
        if phase.has_weights:
            self._add((ActionKind.GRADIENT, name, None, True), before, gradient)
        put_off = "no weight gradients were put off, or they have run"
        self._add(
            (ActionKind.WEIGHT, name, None, False),
            [(gradient, True, put_off), (weights, False, put_off)],
            weights,
        )
        if phase.drops:
            earlier = [
                (self._bit(("recomputed", other)), True, f"{other} must be recomputed first")
                for other in phase.recompute_after
            ]
            self._add(
                (ActionKind.RECOMPUTE, name, None, False),
                [
                    (computed, True, "its forward has not run"),
                    (recomputed, False, "already recomputed"),
                    *earlier,
                ],
                recomputed,
            )

    def _exchange(self, exchange: ExchangeShape) -> None:
        name = exchange.name
        for direction in Pass:
            conditions = self._values(exchange.reads)
            if direction is Pass.BACKWARD:
                if not (self._training and exchange.differentiable):
                    continue
                conditions = [
                    (self._bit(("awaited.F", name)), True, "its forward has not completed"),
                    *self._gradients(exchange.writes),
                ]
            issued = self._bit((f"issued.{direction.value}", name))
            awaited = self._bit((f"awaited.{direction.value}", name))
            self._add(
                (ActionKind.ISSUE, name, direction, False),
                [(issued, False, "already issued"), *conditions],
                issued,
            )
            self._add(
                (ActionKind.WAIT, name, direction, False),
                [(issued, True, "not issued"), (awaited, False, "already awaited")],
                awaited,
            )

    def _messages(self, direction: Pass) -> None:
        """What goes out in `direction`, and what comes in."""
        own = self._layout.chunk_rank[self._chunk]
        other = self._neighbour(direction, leaving=True)
        if other is not None:
            left = self._bit((f"left.{direction.value}", ""))
            ready = (
                (self._value(CHUNK_OUTPUT), True, "the chunk's output does not exist yet")
                if direction is Pass.FORWARD
                else (self._gradient(CHUNK_INPUT), True, "the gradient of the chunk's input is not complete")
            )
            conditions = [(left, False, "already handed on"), ready]
            owner = self._layout.chunk_rank[other]
            kind = ActionKind.HAND_OVER if owner == own else ActionKind.SEND
            peer = None if owner == own else owner
            there = self._bit(came(direction) if owner == own else landed(direction))
            self._add((kind, "", direction, False), conditions, left, peer=peer, consumer=other, there=there)
        other = self._neighbour(direction, leaving=False)
        if other is not None and self._layout.chunk_rank[other] != own:
            peer = self._layout.chunk_rank[other]
            posted = self._bit((f"posted.{direction.value}", ""))
            here = self._bit(came(direction))
            self._add(
                (ActionKind.RECV, "", direction, False),
                [(posted, False, "already posted")],
                posted,
                peer=peer,
                consumer=self._chunk,
            )
            self._add(
                (ActionKind.ARRIVE, "", direction, False),
                [(posted, True, "its receive was not posted"), (here, False, "it has already arrived")],
                here,
                peer=peer,
                consumer=self._chunk,
                there=self._bit(landed(direction)),
            )

    def _free(self) -> None:
        """Everything that the pass owes must have happened."""
        due: list[tuple[int, bool, str]] = []

        def owe(reason: str, *facts: Fact) -> None:
            due.append((self._bit(*facts), True, reason))

        for phase in self._flow.phases:
            owe(f"forward of {phase.name} has not run", ("computed", phase.name))
        for phase in self._flow.phases if self._training else ():
            owe(f"backward of {phase.name} has not run", ("gradient", phase.name))
            owe(f"weight gradients of {phase.name} have not run", ("weights", phase.name))
        for exchange in self._flow.exchanges:
            owe(f"exchange {exchange.name}.F has not completed", ("awaited.F", exchange.name))
            if self._training and exchange.differentiable:
                owe(f"exchange {exchange.name}.B has not completed", ("awaited.B", exchange.name))
        for direction, what in ((Pass.FORWARD, "output"), (Pass.BACKWARD, "gradient of its input")):
            if direction is Pass.BACKWARD and not self._training:
                continue
            if self._neighbour(direction, leaving=True) is not None:
                owe(f"its {what} was never handed on", (f"left.{direction.value}", ""))
            if self._neighbour(direction, leaving=False) is not None:
                owe("what it was to receive has not come", came(direction))
        self._add((ActionKind.FREE, "", None, False), due, FREED_BIT)


_LEAVING = frozenset({ActionKind.SEND, ActionKind.HAND_OVER})


@lru_cache(maxsize=256)
def rules_of(
    shape: ChunkShape, chunk: int, chunk_rank: tuple[int, ...], num_copies: int, training: bool
) -> ChunkRules:
    """Rules do not depend on the number of microbatches, so programs share them."""
    return ChunkRules(shape, Layout(chunk_rank, 0, num_copies), chunk, training=training)
