"""Streams that only write down what they are given, while a CPU computes it: what `hazards` checks.

The streams are `EventStreams`, the very code that drives a GPU, on a device that records. What computes is
seen operation by operation below autograd, with the memory it reads and writes. Memory is told by its
storage, from allocation to the moment when nothing refers to it any more.

Autograd's own rules are taken from PyTorch's documentation ("CUDA semantics: stream semantics of backward
passes") and written down as it would follow them: the backward of an operation runs on the stream of its
forward, waits for the streams that its gradients come from, and is waited for where its own go.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [*tensors_in(list(args)), *tensors_in(list((kwargs or {}).values()))]
        reads = self._memories(given)
        outputs = func(*args, **(kwargs or {}))
        if func.is_view:
            return outputs
        changed = self._memories(_changed(func, args, kwargs or {}))
        made = [tensor for tensor in tensors_in(outputs) if not self._is_known(tensor)]
        for tensor in made:
            self._new(tensor, owner=self.current)
        writes = dict.fromkeys([*changed, *self._memories(made)])
        self.log.append(Launch(self.current, str(func), tuple(reads), tuple(writes)))
        return outputs

    def event(self, stream: str) -> int:
        self._num_events += 1
        self.log.append(Record(stream, self._num_events))
        return self._num_events

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
            goes_on = [following for following, _ in node.next_functions if following is not None]
            self._backward_runs_urgently(
                node, enters=node in ends, leaves=any(following not in made for following in goes_on)
            )
        return outputs

    def _backward_runs_urgently(self, node: Node, *, enters: bool, leaves: bool) -> None:
        """What autograd does where a backward's stream is not that of its gradients (`enters`) or of where
        its own go (`leaves`); between nodes of one stream it does nothing.
        """
        recorder, urgent = self._recorder, "urgent"

        def enter(gradients: Sequence[Tensor | None]) -> None:
            if enters:
                recorder.share(tuple(gradients), urgent)
                recorder.log.append(Wait(urgent, recorder.event(COMPUTE), AUTOGRAD))
            recorder.current = urgent

        def leave(gradients: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
            if leaves:
                recorder.share(tuple(gradients), COMPUTE)
                recorder.log.append(Wait(COMPUTE, recorder.event(urgent), AUTOGRAD))
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
