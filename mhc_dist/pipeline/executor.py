"""Runs one rank's part of a program: one thread, one loop, one action after the other.

All order is in the program. The executor only knows how to do each kind of action; overlap comes from the
distance the program puts between starting a communication and waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    Action,
    ActionKind,
    Pass,
    Program,
)
from mhc_dist.pipeline.live import LiveMicrobatch
from mhc_dist.pipeline.phase import Chunk, Exchange, Item, Phase
from mhc_dist.pipeline.streams import HostStreams, Streams, Token
from mhc_dist.pipeline.trace import Event, Trace
from mhc_dist.pipeline.transport import PendingMessage, Transport
from mhc_dist.pipeline.wire import Waited, WireTimes, split_wait


class Microbatch(NamedTuple):
    """What is given from outside: the first chunk's input and the last chunk's targets."""

    tokens: Any
    targets: Any


class StepEnd(Protocol):
    """What happens once all gradients of a step are there."""

    def reduce(self) -> None: ...

    def step(self, losses: Sequence[Tensor]) -> float | None:
        """Gets this rank's losses of the step, to refuse one that is not finite.

        Returns the seconds it waited for other ranks to get here, where it knows them.
        """
        ...


class StepOutput(NamedTuple):
    """losses: one scalar per microbatch on the rank that holds the last chunk, else empty."""

    losses: list[Tensor]
    trace: Trace


class Executor:
    """One rank's executor.

    rank: pipeline rank. chunks: this rank's chunks by index. on_action: told every action before it starts,
    so that a watchdog can say where a rank is stuck. stretch: called when an action is done, with the time it
    started; what it spends counts as part of the action (benches give actions their nominal time with it).
    wires: what tells waiting for a peer from waiting for the wire; without it, all is put down to the wire.
    streams: those of the chunks, the exchange and the transport; by default the CPU's.
    """

    def __init__(
        self,
        rank: int,
        chunks: Mapping[int, Chunk],
        transport: Transport,
        on_action: Callable[[Action], None] | None = None,
        stretch: Callable[[Action, float], None] | None = None,
        wires: WireTimes | None = None,
        streams: Streams | None = None,
    ) -> None:
        self._rank, self._chunks, self._transport, self._on_action = rank, chunks, transport, on_action
        self._stretch, self._wires = stretch, wires
        self._streams = streams or HostStreams()
        self._items: dict[tuple[int, str], Item] = {
            (chunk.index, item.shape.name): item for chunk in chunks.values() for item in chunk.items
        }

    def run(
        self, program: Program, microbatches: Sequence[Microbatch], step_end: StepEnd | None = None
    ) -> StepOutput:
        """Execute the program once. Gradients are those of the mean loss over the microbatches.

        step_end is required when the program has REDUCE and STEP actions.
        """
        assert len(microbatches) == program.num_microbatches, (len(microbatches), program.num_microbatches)
        streams = self._streams
        marks = [streams.mark()]
        run = _Run(
            self._rank, self._chunks, self._items, self._transport, streams, program, microbatches, step_end
        )
        actions = program.actions[self._rank]
        moved: list[_Done] = []
        for action in actions:
            if self._on_action is not None:
                self._on_action(action)
            began = perf_counter()
            marks.append(streams.mark())
            moved.append(run.do(action))
            if self._stretch is not None:
                self._stretch(action, began)
            marks.append(streams.mark())
        self._transport.drain()
        run.check_finished()
        marks.append(streams.mark())
        trace = self._trace(actions, streams.seconds(marks), moved)
        return StepOutput([loss for _, loss in sorted(run.losses.items())], trace)

    def _trace(self, actions: Sequence[Action], times: Sequence[float], moved: Sequence[_Done]) -> Trace:
        """times: start of the run, start and end of every action, end of the run."""
        trace = Trace(began=times[0], ended=times[-1])
        for action, start, end, done in zip(actions, times[1:-1:2], times[2:-1:2], moved, strict=True):
            waited = self._waited(action, end - start, done)
            trace.events.append(Event(action, start, end, done.num_bytes, waited.blocked, waited.starved))
        return trace

    def _waited(self, action: Action, seconds: float, done: _Done) -> Waited:
        """Which part of an action was waiting, and what for."""
        match action.kind:
            case ActionKind.WAIT:
                on_wire = None if self._wires is None else self._wires.exchange_seconds(done.wire_bytes)
                return split_wait(seconds, on_wire)
            case ActionKind.ARRIVE:
                on_wire = None if self._wires is None else self._wires.message_seconds(done.wire_bytes)
                return split_wait(seconds, on_wire)
            case _:
                return Waited(blocked=0.0, starved=min(seconds, done.starved_seconds))


class _Done(NamedTuple):
    """What an action moved: bytes that left or came; bytes that the wire it waited for had to carry."""

    num_bytes: int = 0
    wire_bytes: int = 0
    starved_seconds: float = 0.0


_NOTHING_MOVED = _Done()


class _Run:
    """The state of one execution of a program."""

    def __init__(
        self,
        rank: int,
        chunks: Mapping[int, Chunk],
        items: Mapping[tuple[int, str], Item],
        transport: Transport,
        streams: Streams,
        program: Program,
        microbatches: Sequence[Microbatch],
        step_end: StepEnd | None,
    ) -> None:
        self._rank, self._chunks, self._items = rank, chunks, items
        self._transport, self._program, self._step_end = transport, program, step_end
        self._streams = streams
        self._microbatches = microbatches
        self._last_chunk = len(program.chunk_rank) - 1
        self._live: dict[tuple[int, int], LiveMicrobatch] = {}
        self._messages: dict[tuple[int, int, Pass], PendingMessage] = {}
        self.losses: dict[int, Tensor] = {}

    def do(self, action: Action) -> _Done:
        """One action."""
        match action.kind:
            case ActionKind.COMPUTE:
                self._compute(action)
            case ActionKind.GRADIENT:
                self._of(action).gradient(self._phase(action), defer_weights=action.defer_weights)
            case ActionKind.WEIGHT:
                self._of(action).weight(self._phase(action))
            case ActionKind.ISSUE:
                return _Done(self._of(action).issue(self._exchange(action), _direction(action)))
            case ActionKind.WAIT:
                load = self._of(action).wait(self._exchange(action), _direction(action))
                return _Done(load.received_bytes, max(load.sent_bytes, load.received_bytes))
            case ActionKind.RECV:
                assert action.peer is not None
                key = (action.chunk, action.microbatch, _direction(action))
                self._messages[key] = self._transport.receive(action.peer)
            case ActionKind.ARRIVE:
                message = self._messages.pop((action.chunk, action.microbatch, _direction(action)))
                tensor = message.wait()
                self._arrive(action.chunk, action.microbatch, _direction(action), tensor, message.token)
                return _Done(message.payload_bytes, message.payload_bytes)
            case ActionKind.SEND:
                assert action.peer is not None
                tensor = self._leave(action)
                self._transport.send(tensor, action.peer)
                return _Done(tensor.numel() * tensor.element_size())
            case ActionKind.HAND_OVER:
                step = 1 if action.direction is Pass.FORWARD else -1
                tensor = self._leave(action)
                token = self._streams.position()
                self._arrive(action.chunk + step, action.microbatch, _direction(action), tensor, token)
            case ActionKind.FREE:
                self._live.pop((action.chunk, action.microbatch)).check_finished()
            case ActionKind.REDUCE:
                assert self._step_end is not None, (
                    "the program reduces gradients but nobody was given to do it"
                )
                self._step_end.reduce()
            case ActionKind.STEP:
                assert self._step_end is not None, "the program steps the optimizer but none was given"
                return _Done(starved_seconds=self._step_end.step(list(self.losses.values())) or 0.0)
            case ActionKind.RECOMPUTE:
                self._of(action).recompute(self._phase(action))
        return _NOTHING_MOVED

    def check_finished(self) -> None:
        assert not self._live, f"not freed: {sorted(self._live)}"
        assert not self._messages, f"never arrived: {sorted(self._messages)}"
        pending = sum(chunk.weight_queue.num_pending for chunk in self._chunks.values())
        assert not pending, f"{pending} weight gradients never computed"

    def _of(self, action: Action) -> LiveMicrobatch:
        return self._live_at(action.chunk, action.microbatch)

    def _live_at(self, chunk: int, microbatch: int) -> LiveMicrobatch:
        key = (chunk, microbatch)
        if key not in self._live:
            given: dict[str, Any] = {}
            if chunk == 0:
                given[CHUNK_INPUT] = self._microbatches[microbatch].tokens
            if chunk == self._last_chunk:
                given[CHUNK_TARGETS] = self._microbatches[microbatch].targets
            self._live[key] = LiveMicrobatch(
                self._chunks[chunk], microbatch, given, self._streams, training=self._program.training
            )
        return self._live[key]

    def _phase(self, action: Action) -> Phase:
        item = self._items[action.chunk, action.item]
        assert isinstance(item, Phase), action
        return item

    def _exchange(self, action: Action) -> Exchange:
        item = self._items[action.chunk, action.item]
        assert isinstance(item, Exchange), action
        return item

    def _compute(self, action: Action) -> None:
        live, phase = self._of(action), self._phase(action)
        live.compute(phase)
        if action.chunk == self._last_chunk and CHUNK_OUTPUT in phase.shape.writes:
            loss = live.take(CHUNK_OUTPUT)
            self.losses[action.microbatch] = loss
            if self._program.training:
                # The step's loss is the mean over microbatches, so each starts its backward with 1 / M.
                live.gradients.add(CHUNK_OUTPUT, torch.full_like(loss, 1.0 / self._program.num_microbatches))

    def _leave(self, action: Action) -> Tensor:
        """The tensor that goes out of a chunk: its output (F) or the gradient of its input (B)."""
        live = self._of(action)
        tensor = (
            live.take(CHUNK_OUTPUT) if action.direction is Pass.FORWARD else live.gradients.take(CHUNK_INPUT)
        )
        assert isinstance(tensor, Tensor), f"{action}: nothing to hand on"
        return tensor

    def _arrive(self, chunk: int, microbatch: int, direction: Pass, tensor: Tensor, token: Token) -> None:
        live = self._live_at(chunk, microbatch)
        if direction is Pass.FORWARD:
            live.put(CHUNK_INPUT, tensor, token)
        else:
            live.gradients.add(CHUNK_OUTPUT, tensor)


def _direction(action: Action) -> Pass:
    assert action.direction is not None, action
    return action.direction
