"""Streams that only write down what they are given, while a CPU computes it: what `hazards` checks.

The streams are `EventStreams`, the very code that drives a GPU, on a device that records. What computes is
seen operation by operation below autograd, with the memory it reads and writes. Memory is told by its
storage, from allocation to the moment when nothing refers to it any more.

Autograd's own rules are taken from PyTorch's documentation ("CUDA semantics: stream semantics of backward
passes") and written down as it would follow them: the backward of an operation runs on the stream of its
forward, waits for the streams that its gradients come from, and is waited for where its own go. It has let
go of what its forward saved before anybody waits for it, and gradients are added up where the sum is used.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_dist.pipeline.hazards import Allocate, Entry, Free, Launch, Record, Share, Wait
from mhc_dist.pipeline.streams import DeviceStream, EventStreams, tensors_in

COMPUTE = "compute"
AUTOGRAD = "autograd"
Result = TypeVar("Result")


class Recorder(TorchDispatchMode):
    """`log` of everything that happens while this mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Entry] = []
        self.current = COMPUTE
        self._memory: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._num_events = 0
        self._num_memories = 0
        self._due: list[Wait] = []
        self._summands: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*tensors_in(list(args)), *tensors_in(list((kwargs or {}).values()))]
        reads = self._memories(given)
        stream = self._stream_of(func, reads)
        if stream == COMPUTE:
            self._wait()
        outputs = func(*args, **(kwargs or {}))
        if func.is_view:
            return outputs
        changed = self._memories(_changed(func, args, kwargs or {}))
        made = [tensor for tensor in tensors_in(outputs) if not self._is_known(tensor)]
        for tensor in made:
            self._new(tensor, owner=stream)
        writes = dict.fromkeys([*changed, *self._memories(made)])
        if stream != self.current:
            self._summands.update(dict.fromkeys(writes, stream))
        self.log.append(Launch(stream, str(func), tuple(reads), tuple(writes)))
        return outputs

    def event(self, stream: str) -> int:
        if stream == COMPUTE:
            self._wait()
        self._num_events += 1
        self.log.append(Record(stream, self._num_events))
        return self._num_events

    def wait_before_next(self, event: int, site: str) -> None:
        """Compute waits for the event right before its next work: what is freed by then is freed earlier."""
        self._due.append(Wait(COMPUTE, event, site))

    def _wait(self) -> None:
        self.log += self._due
        self._due.clear()

    def sum_on(self, stream: str, gradients: Any, but_not: Any) -> None:
        """Gradients of which autograd, between two nodes, makes the sum that a node of `stream` gets, with
        those from elsewhere, for which it waits. Memory of `but_not` leaves that stream.
        """
        self._summands.update(dict.fromkeys(self._memories(tensors_in(gradients)), stream))
        for memory in self._memories(tensors_in(but_not)):
            self._summands.pop(memory, None)

    def _stream_of(self, func: Any, reads: list[int]) -> str:
        is_sum = func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_) and len(reads) > 1
        known = [memory for memory in reads if memory in self._summands]
        if self.current != COMPUTE or not is_sum or not known:
            return self.current
        stream = self._summands[known[0]]
        others = [memory for memory in reads if memory not in self._summands]
        if others:
            self.log += [Share(stream, memory) for memory in others]
            self.log.append(Wait(stream, self.event(self.current), AUTOGRAD))
        return stream

    def share(self, tensors: Any, stream: str) -> None:
        self.log += [Share(stream, memory) for memory in self._memories(tensors_in(tensors))]

    def _memories(self, tensors: Any) -> list[int]:
        """Numbers of the memory behind tensors; memory that was there before recording has no owner."""
        found: dict[int, None] = {}
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                if not self._is_known(tensor):
                    self._new(tensor, owner=None)
                found[self._memory[_storage(tensor)]] = None
        return list(found)

    def _is_known(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._memory

    def _new(self, tensor: Tensor, owner: str | None) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if not storage.nbytes():
            return
        self._num_memories += 1
        memory = self._memory[key] = self._num_memories

        def free(_: Any) -> None:
            del self._memory[key], self._alive[key]
            self.log.append(Free(memory))

        self._alive[key] = weakref.ref(storage, free)
        if owner is not None:
            self.log.append(Allocate(owner, memory))


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that an operation writes into, by its schema."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += list(tensors_in(value))
    return written


class RecordedEvent:
    """An event that can be waited for; its time means nothing."""

    def __init__(self, number: int) -> None:
        self.number = number

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: RecordedEvent) -> float:
        return 0.0


class RecordedStream:
    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self._recorder = name, recorder

    def wait_event(self, event: RecordedEvent) -> None:
        site = sys._getframe(1).f_code.co_name
        self._recorder.log.append(Wait(self.name, event.number, site))

    def record_event(self, event: Any = None) -> RecordedEvent:
        return RecordedEvent(self._recorder.event(self.name))


class RecordingDevice:
    """A `Device` whose streams write into a recorder's log."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def compute_stream(self) -> DeviceStream:
        return RecordedStream(COMPUTE, self._recorder)

    def new_stream(self, name: str, *, urgent: bool) -> DeviceStream:
        return RecordedStream(name, self._recorder)

    def timed_event(self) -> RecordedEvent:
        return RecordedEvent(-1)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        outer, self._recorder.current = self._recorder.current, stream.name
        try:
            yield
        finally:
            self._recorder.current = outer

    def keep(self, tensor: Tensor, stream: Any) -> None:
        self._recorder.share(tensor, stream.name)


class RecordedStreams(EventStreams):
    """`EventStreams` into a log, autograd's streams included."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(RecordingDevice(recorder))
        self._recorder = recorder

    def urgently(self, run: Callable[..., Result], *inputs: Any) -> Result:
        outputs = super().urgently(run, *inputs)
        made = _made_between(inputs, outputs)
        ends = {tensor.grad_fn for tensor in tensors_in(outputs)}
        for node in made:
            self._backward_runs_urgently(node, made, enters=node in ends)
        return outputs

    def _backward_runs_urgently(self, node: Node, made: set[Node], *, enters: bool) -> None:
        """What autograd does where a backward's stream is not that of its gradients (`enters`) or of where
        its own go, outside of `made`; between nodes of one stream it adds up.
        """
        recorder, urgent = self._recorder, "urgent"
        goes_on = [following for following, _ in node.next_functions]
        leaves = any(following is not None and following not in made for following in goes_on)

        def enter(gradients: Sequence[Tensor | None]) -> None:
            if enters:
                recorder.share(tuple(gradients), urgent)
                recorder.log.append(Wait(urgent, recorder.event(COMPUTE), AUTOGRAD))
            recorder.current = urgent

        def leave(gradients: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
            if leaves:
                recorder.share(tuple(gradients), COMPUTE)
                # Autograd waits when it goes on, and has let go by then of what the node had saved.
                recorder.wait_before_next(recorder.event(urgent), AUTOGRAD)
            pairs = list(zip(gradients, goes_on, strict=True))
            outside = [gradient for gradient, following in pairs if following not in made]
            inside = [gradient for gradient, following in pairs if following in made]
            recorder.sum_on(urgent, inside, but_not=outside)
            recorder.current = COMPUTE

        node.register_prehook(enter)
        node.register_hook(leave)


def _made_between(inputs: Any, outputs: Any) -> set[Node]:
    """Autograd's nodes from `outputs` back to `inputs`, without the parameters' own."""
    seen = {tensor.grad_fn for tensor in tensors_in(inputs)} | {None}
    found: set[Node] = set()
    ahead = [tensor.grad_fn for tensor in tensors_in(outputs)]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or node.name() == "torch::autograd::AccumulateGrad":
            continue
        seen.add(node)
        found.add(node)
        ahead += [following for following, _ in node.next_functions]
    return found
