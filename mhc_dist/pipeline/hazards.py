"""Proves from a log of what streams were given that no order between them is missing. Standard library only.

Work on one stream runs in order; between streams only events order anything. Every stream carries a vector
clock: how much of each stream's work is certain to be over. An event is a copy of its stream's clock, waiting
for it takes the larger entries. An access is safe if the access it must follow is in its stream's clock:

* a read follows the last write; a write follows the last write and all reads since;
* an allocation is a write by the stream whose memory it is: that stream may have used the same bytes before;
* once freed, memory goes back to that stream, so by then its clock must hold every access, or the clock of a
  stream of which the allocator knows (`Share`), since it waits for all that this stream was given by then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Launch:
    """Work given to a stream. `reads`, `writes`: memory, by number."""

    stream: str
    name: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """The event is reached when the stream's work so far is over."""

    stream: str
    event: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Later work of the stream comes after the event. `site` says which line of code asked for it."""

    stream: str
    event: int
    site: str = ""


@dataclass(frozen=True, slots=True)
class Allocate:
    """Memory is taken from what belongs to `stream`."""

    stream: str
    memory: int


@dataclass(frozen=True, slots=True)
class Share:
    """The allocator is told that `stream` uses the memory, too."""

    stream: str
    memory: int


@dataclass(frozen=True, slots=True)
class Free:
    """The host holds no reference any more."""

    memory: int


Entry = Launch | Record | Wait | Allocate | Share | Free


@dataclass(frozen=True, slots=True)
class Hazard:
    """An access that nothing makes wait for an earlier one."""

    position: int
    kind: str
    later: str
    earlier: str
    memory: int

    def __str__(self) -> str:
        return (
            f"entry {self.position}, {self.kind} of memory {self.memory}: {self.later} does not wait for"
            f" {self.earlier}"
        )


@dataclass(frozen=True, slots=True)
class _Access:
    stream: str
    count: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} on {self.stream}"


Clock = dict[str, int]


@dataclass
class _Memory:
    """What is known of one piece of memory. `owner` is None for what was there before the log began."""

    owner: str | None = None
    written: _Access | None = None
    read: dict[str, _Access] = field(default_factory=dict)
    touched: dict[str, _Access] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)


def find_hazards(log: Iterable[Entry]) -> list[Hazard]:
    """Every hazard in `log`, in its order."""
    checker = _Checker()
    for position, entry in enumerate(log):
        checker.take(position, entry)
    return checker.hazards


class _Checker:
    def __init__(self) -> None:
        self.hazards: list[Hazard] = []
        self._clocks: dict[str, Clock] = defaultdict(dict)
        self._events: dict[int, Clock] = {}
        self._memory: dict[int, _Memory] = defaultdict(_Memory)

    def take(self, position: int, entry: Entry) -> None:
        match entry:
            case Launch(stream, name, reads, writes):
                access = self._tick(stream, name)
                for memory in reads:
                    self._read(position, access, memory)
                for memory in writes:
                    self._write(position, access, memory)
            case Record(stream, event):
                self._events[event] = dict(self._clocks[stream])
            case Wait(stream, event):
                clock = self._clocks[stream]
                for other, count in self._events[event].items():
                    clock[other] = max(count, clock.get(other, 0))
            case Allocate(stream, memory):
                access = self._tick(stream, "allocation")
                self._memory[memory] = _Memory(stream, access, touched={stream: access})
            case Share(stream, memory):
                self._memory[memory].shared.add(stream)
            case Free(memory):
                self._free(position, memory)

    def _tick(self, stream: str, name: str) -> _Access:
        clock = self._clocks[stream]
        clock[stream] = clock.get(stream, 0) + 1
        return _Access(stream, clock[stream], name)

    def _follows(self, stream: str, earlier: _Access) -> bool:
        return self._clocks[stream].get(earlier.stream, 0) >= earlier.count

    def _read(self, position: int, access: _Access, memory: int) -> None:
        held = self._memory[memory]
        if held.written is not None and not self._follows(access.stream, held.written):
            self._report(position, "read", access, held.written, memory)
        held.read[access.stream] = held.touched[access.stream] = access

    def _write(self, position: int, access: _Access, memory: int) -> None:
        held = self._memory[memory]
        before = list(held.read.values()) + ([] if held.written is None else [held.written])
        for earlier in before:
            if earlier != access and not self._follows(access.stream, earlier):
                self._report(position, "write", access, earlier, memory)
        held.written, held.read = access, {}
        held.touched[access.stream] = access

    def _free(self, position: int, memory: int) -> None:
        held = self._memory.pop(memory, _Memory())
        if held.owner is None:
            return
        waited_for = {held.owner, *held.shared}
        for access in held.touched.values():
            if not any(self._follows(stream, access) for stream in waited_for):
                reuse = _Access(held.owner, 0, "the next use")
                self._report(position, "reuse", reuse, access, memory)

    def _report(self, position: int, kind: str, later: _Access, earlier: _Access, memory: int) -> None:
        self.hazards.append(Hazard(position, kind, str(later), str(earlier), memory))
