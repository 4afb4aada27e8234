"""Where work runs: a compute stream, two urgent ones beside it, and a lane for every communicator.

    compute   phases, in the program's order
    urgent    high priority: post/res of expert layers, which end the wait for a combine and start the next
              layer (mHC paper, 4.3.3). It waits for what it reads and for nothing else, so it overtakes
              compute work that is queued already.
    answers   high priority: what the host has to know, that is the plan of arriving rows. Nothing else runs
              here: behind the backward of post/res, say, the host would wait for all of that backward.
    lanes     one per communicator: its transfers run in order, and different lanes never wait for each other

Streams meet at events. While phases run the host waits for none of them, with one exception per expert layer:
how many rows arrive decides the sizes of buffers (`PendingCounts`), and that wait is for the stream of
answers alone.

Memory follows three rules, which `hazards` proves of recorded runs.

A transfer holds its buffers until the compute stream waits for its end (`land`): what frees them then, frees
them after it. They are not marked as used on the lane as well. The allocator would then keep them from reuse
until the lane has done all it was given by the time they are freed, which is the next receive, too, and that
may wait for a message for long. Nor does it matter who made them: what the compute stream is given to send
from an urgent stream's memory is marked as used on compute, and that has waited.

For the end of a send compute does not wait, so that a slow receiver holds nothing up. Its buffer is marked as
used on the lane when it is let go (`release`).

What goes into or comes out of an urgent stream is marked as used on both: the allocator then hands it out
again only when both have passed its last use. Otherwise autograd would free what an urgent backward has read
before it makes compute wait for that. What is held until a backward has returned needs no mark: by then
compute waits for all of it. And what autograd passes from stream to stream is autograd's business: it runs a
backward where its forward ran.

`HostStreams` is the CPU: one thread, what returns is over, and transfers are waited for by the host.
`EventStreams` is a device with streams: `CudaDevice`, or one that records (`recording`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

Token = Any
"""A point in the work of a stream that other streams can wait for."""

Mark = Any
"""A point on the compute stream whose time is known once the step is over."""


class Work(Protocol):
    """A transfer as torch.distributed hands it out."""

    def wait(self) -> object: ...


class Flight(Protocol):
    """A transfer on its lane; holds its buffers."""

    def land(self) -> Token:
        """The compute stream waits for the end of the transfer. Returns that end, for other streams."""
        ...

    def release(self) -> None:
        """In place of `land`, for what is sent: its memory is free once it has left.

        The compute stream does not wait for that. The host does where only it can tell (a CPU).
        """
        ...


class Streams(Protocol):
    """What the executor, transfers and chunks need of streams."""

    def transfer(self, lane: str, start: Callable[[], Work], buffers: Sequence[Tensor]) -> Flight:
        """Start a transfer on its lane, after all work given to the compute stream so far.

        buffers: all memory that it reads or writes, held until it has landed or is released.
        """
        ...

    def position(self) -> Token:
        """The end of what the compute stream has been given so far."""
        ...

    def reading(self, tokens: Sequence[Token]) -> AbstractContextManager[None]:
        """Around a phase: what it reads is there after `tokens`, for which the compute stream waits."""
        ...

    def urgently(self, run: Callable[..., Result], *inputs: Any) -> Result:
        """run(*inputs) on the urgent stream, after the tokens of the phase around it.

        Whatever it reads was there by then or is made by itself. That goes for parameters as well: each token
        is later than the step that changed them. The compute stream goes on after it.
        """
        ...

    def answer(self, run: Callable[..., Result], *inputs: Any, after: Token) -> Result:
        """run(*inputs), in which the host asks for values of `inputs`, which are there after the token.

        It waits for these alone. The compute stream goes on after what `run` made.
        """
        ...

    def mark(self) -> Mark: ...

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """When the compute stream passed each mark, on this process's monotonic clock; waits for the last."""
        ...


class _HostFlight:
    """A transfer that the host waits for."""

    def __init__(self, work: Work, buffers: Sequence[Tensor]) -> None:
        self._work, self._buffers = work, tuple(buffers)

    def land(self) -> Token:
        self._work.wait()
        return None

    def release(self) -> None:
        self._work.wait()


class HostStreams:
    """One thread and no streams."""

    def transfer(self, lane: str, start: Callable[[], Work], buffers: Sequence[Tensor]) -> Flight:
        return _HostFlight(start(), buffers)

    def position(self) -> Token:
        return None

    @contextmanager
    def reading(self, tokens: Sequence[Token]) -> Iterator[None]:
        yield

    def urgently(self, run: Callable[..., Result], *inputs: Any) -> Result:
        return run(*inputs)

    def answer(self, run: Callable[..., Result], *inputs: Any, after: Token) -> Result:
        return run(*inputs)

    def mark(self) -> Mark:
        return perf_counter()

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        return list(marks)


class DeviceEvent(Protocol):
    """As torch.cuda.Event."""

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class DeviceStream(Protocol):
    """As torch.cuda.Stream."""

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any: ...


class Device(Protocol):
    """What `EventStreams` needs of a device."""

    def compute_stream(self) -> DeviceStream: ...

    def new_stream(self, name: str, *, urgent: bool) -> DeviceStream: ...

    def timed_event(self) -> DeviceEvent: ...

    def on(self, stream: DeviceStream) -> AbstractContextManager[Any]:
        """Launch on `stream` and allocate from its memory."""
        ...

    def keep(self, tensor: Tensor, stream: DeviceStream) -> None:
        """Once freed, the memory of `tensor` waits for `stream` before it is used again."""
        ...


class _EventFlight:
    def __init__(
        self,
        device: Device,
        lane: DeviceStream,
        end: DeviceEvent,
        compute: DeviceStream,
        buffers: Sequence[Tensor],
    ) -> None:
        self._device, self._lane, self._end, self._compute = device, lane, end, compute
        self._buffers: tuple[Tensor, ...] = tuple(buffers)

    def land(self) -> Token:
        self._compute.wait_event(self._end)
        self._buffers = ()
        return self._end

    def release(self) -> None:
        for buffer in self._buffers:
            self._device.keep(buffer, self._lane)
        self._buffers = ()


class EventStreams:
    """Streams of a device that run side by side and meet at events."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._compute = device.compute_stream()
        self._urgent = device.new_stream("urgent", urgent=True)
        self._answers = device.new_stream("answers", urgent=True)
        self._lanes: dict[str, DeviceStream] = {}
        self._read: Sequence[Token] = ()

    def transfer(self, lane: str, start: Callable[[], Work], buffers: Sequence[Tensor]) -> Flight:
        if lane not in self._lanes:
            self._lanes[lane] = self._device.new_stream(lane, urgent=False)
        stream = self._lanes[lane]
        # Data to send is there, and memory to receive into is no longer used for anything else.
        stream.wait_event(self._compute.record_event())
        with self._device.on(stream):
            # NCCL: makes the stream wait for the communicator's own one, not the host. From here on torch
            # holds no buffer for the transfer, which is done by the flight.
            start().wait()
        return _EventFlight(self._device, stream, stream.record_event(), self._compute, buffers)

    def position(self) -> Token:
        return self._compute.record_event()

    @contextmanager
    def reading(self, tokens: Sequence[Token]) -> Iterator[None]:
        outer, self._read = self._read, tuple(dict.fromkeys(tokens))
        try:
            yield
        finally:
            self._read = outer

    def urgently(self, run: Callable[..., Result], *inputs: Any) -> Result:
        return self._beside(self._urgent, self._read, run, inputs)

    def answer(self, run: Callable[..., Result], *inputs: Any, after: Token) -> Result:
        return self._beside(self._answers, [after], run, inputs)

    def _beside(
        self, stream: DeviceStream, after: Sequence[Token], run: Callable[..., Result], inputs: Any
    ) -> Result:
        for token in after:
            stream.wait_event(token)
        self._keep_on(stream, inputs)
        with self._device.on(stream):
            outputs = run(*inputs)
        self._compute.wait_event(stream.record_event())
        self._keep_on(stream, outputs)
        return outputs

    def _keep_on(self, stream: DeviceStream, tensors: Any) -> None:
        for tensor in tensors_in(tensors):
            self._device.keep(tensor, self._compute)
            self._device.keep(tensor, stream)

    def mark(self) -> Mark:
        return self._compute.record_event(self._device.timed_event())

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        last: DeviceEvent = marks[-1]
        last.synchronize()
        now = perf_counter()
        return [now - mark.elapsed_time(last) / 1e3 for mark in marks]


class CudaDevice:
    """CUDA. `cuda` is torch.cuda, or what stands for it in a test."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda

    def compute_stream(self) -> DeviceStream:
        stream: DeviceStream = self._cuda.current_stream(self._device)
        return stream

    def new_stream(self, name: str, *, urgent: bool) -> DeviceStream:
        stream: DeviceStream = self._cuda.Stream(self._device, priority=-1 if urgent else 0)
        return stream

    def timed_event(self) -> DeviceEvent:
        event: DeviceEvent = self._cuda.Event(enable_timing=True)
        return event

    def on(self, stream: DeviceStream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._cuda.stream(stream)
        return context

    def keep(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)


def make_streams(device: torch.device) -> Streams:
    """The streams of a rank that computes on `device`."""
    return EventStreams(CudaDevice(device)) if device.type == "cuda" else HostStreams()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
