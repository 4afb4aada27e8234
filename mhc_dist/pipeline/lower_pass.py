"""One whole pass of a microbatch through a chunk as fine-grained actions. Standard library only.

Communication starts as early as its data allows and is awaited as late as possible, so whatever lies between
overlaps with it.
"""

from __future__ import annotations

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
from mhc_dist.pipeline.flow import ChunkFlow, values_with_gradient
from mhc_dist.pipeline.schedules.coarse import Op, OpKind


class ForwardPass:
    """Builds the forward of `chunk` for one microbatch: `actions` after construction."""

    def __init__(self, flow: ChunkFlow, layout: Layout, chunk: int, microbatch: int) -> None:
        self.actions: list[Action] = []
        self._flow = flow
        self._layout = layout
        self._chunk = chunk
        self._microbatch = microbatch
        self._available: set[str] = {CHUNK_TARGETS}
        self._issued: set[str] = set()
        for item in flow.shape.items:
            for value in item.reads:
                self._need(value)
            if isinstance(item, PhaseShape):
                self._put(ActionKind.COMPUTE, item.name)
                self._add(item.writes)
            else:
                self._issue_ready()
        # Exchanges whose result only the backward reads, or that write the output themselves.
        for exchange in flow.exchanges:
            for value in exchange.writes:
                self._need(value)

    def _put(self, kind: ActionKind, item: str = "", direction: Pass | None = None) -> None:
        self.actions.append(Action(kind, self._chunk, self._microbatch, item, direction))

    def _need(self, value: str) -> None:
        """Make `value` available, waiting for it if it is on its way."""
        if value in self._available:
            return
        if value == CHUNK_INPUT:
            arrive = boundary(self._layout, self._chunk, self._microbatch, Pass.FORWARD, arriving=True)
            if arrive is not None:
                self.actions.append(arrive)
            self._add((CHUNK_INPUT,))
            return
        writer = self._flow.writer[value]
        assert writer.name in self._issued, f"{value} is never written"
        self._put(ActionKind.WAIT, writer.name, Pass.FORWARD)
        self._add(writer.writes)

    def _add(self, values: tuple[str, ...]) -> None:
        self._available.update(values)
        self._issue_ready()
        if CHUNK_OUTPUT in values:
            leave = boundary(self._layout, self._chunk, self._microbatch, Pass.FORWARD, arriving=False)
            if leave is not None:
                self.actions.append(leave)

    def _issue_ready(self) -> None:
        for exchange in self._flow.exchanges:
            if exchange.name not in self._issued and self._available.issuperset(exchange.reads):
                self._issued.add(exchange.name)
                self._put(ActionKind.ISSUE, exchange.name, Pass.FORWARD)


class BackwardPass:
    """Builds the backward of `chunk` for one microbatch: `actions` after construction.

    With `defer_weights`, weight gradients are left to `weight_pass`.
    """

    def __init__(
        self, flow: ChunkFlow, layout: Layout, chunk: int, microbatch: int, *, defer_weights: bool
    ) -> None:
        self.actions: list[Action] = []
        self._flow = flow
        self._layout = layout
        self._chunk = chunk
        self._microbatch = microbatch
        self._missing = {value: len(readers) for value, readers in flow.gradient_readers.items()}
        self._missing[CHUNK_OUTPUT] += 1
        self._issued: set[str] = set()
        self._recomputed: set[str] = set()
        self._exchanges = [e for e in reversed(flow.exchanges) if e.differentiable]
        for item in reversed(flow.shape.items):
            if isinstance(item, ExchangeShape) and not item.differentiable:
                continue
            for value in item.writes:
                self._need(value)
            if isinstance(item, PhaseShape):
                self._recompute(item)
                self.actions.append(
                    Action(
                        ActionKind.GRADIENT,
                        chunk,
                        microbatch,
                        item.name,
                        defer_weights=defer_weights and item.has_weights,
                    )
                )
                self._contribute(tuple(values_with_gradient(item)))
            else:
                self._issue_ready()
        self._need(CHUNK_INPUT)

    def _need(self, value: str) -> None:
        """Make the gradient of `value` complete, waiting for what is on its way."""
        if self._missing[value] == 0:
            return
        if value == CHUNK_OUTPUT:
            arrive = boundary(self._layout, self._chunk, self._microbatch, Pass.BACKWARD, arriving=True)
            if arrive is not None:
                self.actions.append(arrive)
            self._contribute((CHUNK_OUTPUT,))
        for reader in self._flow.gradient_readers[value]:
            if isinstance(reader, ExchangeShape):
                assert reader.name in self._issued, f"the gradient of {value} is never complete"
                self.actions.append(
                    Action(ActionKind.WAIT, self._chunk, self._microbatch, reader.name, Pass.BACKWARD)
                )
                self._contribute(reader.reads[:1])
        assert self._missing[value] == 0, f"the gradient of {value} is never complete"

    def _recompute(self, phase: PhaseShape) -> None:
        """Regenerate what `phase` dropped, and before it what the earlier phases of its block dropped."""
        if not phase.drops or phase.name in self._recomputed:
            return
        for name in phase.recompute_after:
            earlier = self._flow.items[name]
            assert isinstance(earlier, PhaseShape), f"{name} is not a phase"
            self._recompute(earlier)
        self._recomputed.add(phase.name)
        self.actions.append(Action(ActionKind.RECOMPUTE, self._chunk, self._microbatch, phase.name))

    def _contribute(self, values: tuple[str, ...]) -> None:
        for value in values:
            self._missing[value] -= 1
        self._issue_ready()
        if CHUNK_INPUT in values and self._missing[CHUNK_INPUT] == 0:
            leave = boundary(self._layout, self._chunk, self._microbatch, Pass.BACKWARD, arriving=False)
            if leave is not None:
                self.actions.append(leave)

    def _issue_ready(self) -> None:
        for exchange in self._exchanges:
            if exchange.name not in self._issued and not any(self._missing[v] for v in exchange.writes):
                self._issued.add(exchange.name)
                self.actions.append(
                    Action(ActionKind.ISSUE, self._chunk, self._microbatch, exchange.name, Pass.BACKWARD)
                )


def weight_pass(flow: ChunkFlow, chunk: int, microbatch: int) -> list[Action]:
    """The weight gradients that a backward with `defer_weights` put off, in the order it put them off."""
    return [
        Action(ActionKind.WEIGHT, chunk, microbatch, phase.name)
        for phase in reversed(flow.phases)
        if phase.has_weights
    ]


class ChunkPasses:
    """All passes of one chunk as actions, made when first asked for and then shared."""

    def __init__(self, shape: ChunkShape, layout: Layout, chunk: int) -> None:
        self._flow = ChunkFlow(shape)
        self._layout = layout
        self._chunk = chunk
        self._made: dict[tuple[OpKind, int], list[Action]] = {}
        self._frees: dict[int, Action] = {}

    def actions(self, op: Op) -> list[Action]:
        """The actions of `op`, which is of this chunk."""
        key = (op.kind, op.microbatch)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._lower(op)
        return made

    def free(self, microbatch: int) -> Action:
        """What follows the last pass of a microbatch."""
        action = self._frees.get(microbatch)
        if action is None:
            action = self._frees[microbatch] = Action(ActionKind.FREE, self._chunk, microbatch)
        return action

    def _lower(self, op: Op) -> list[Action]:
        match op.kind:
            case OpKind.F:
                return ForwardPass(self._flow, self._layout, op.chunk, op.microbatch).actions
            case OpKind.W:
                return weight_pass(self._flow, op.chunk, op.microbatch)
            case OpKind.B | OpKind.I:
                deferred = op.kind is OpKind.I
                return BackwardPass(
                    self._flow, self._layout, op.chunk, op.microbatch, defer_weights=deferred
                ).actions


@lru_cache(maxsize=64)
def passes_of(shape: ChunkShape, chunk: int, chunk_rank: tuple[int, ...], num_copies: int) -> ChunkPasses:
    """Passes do not depend on how many microbatches there are, so programs share them."""
    return ChunkPasses(shape, Layout(chunk_rank, 0, num_copies), chunk)


def boundary(
    layout: Layout, chunk: int, microbatch: int, direction: Pass, *, arriving: bool
) -> Action | None:
    """The action that takes a value into `chunk` (arriving) or out of it, going in `direction`.

    None where there is nothing to do: at the ends of the model, and on the receiving side of a hand-over.
    """
    upstream = layout.previous(chunk) if direction is Pass.FORWARD else layout.next(chunk)
    downstream = layout.next(chunk) if direction is Pass.FORWARD else layout.previous(chunk)
    other = upstream if arriving else downstream
    if other is None:
        return None
    peer = layout.chunk_rank[other]
    if peer == layout.chunk_rank[chunk]:
        return None if arriving else Action(ActionKind.HAND_OVER, chunk, microbatch, direction=direction)
    kind = ActionKind.ARRIVE if arriving else ActionKind.SEND
    return Action(kind, chunk, microbatch, direction=direction, peer=peer)
