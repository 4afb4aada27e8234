"""Why an action waited: for a peer that had not begun, or for data on the wire. Standard library only.

A transfer that nothing delays takes a known time: the wire time of its bytes. So of a wait that ended when
the data landed, at most the last wire time was spent while the data travelled (`blocked`); before that the
sender had not begun (`starved`). Nothing but the rank's own clock is needed: no stamp travels with the data,
no two clocks have to agree, and no rank asks another one for figures.

The definition errs to one side only. A transfer that is slower than its wire time, because others share the
link or, on a host without a network card, because the sending process is busy, counts as not yet begun.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class WireTimes(Protocol):
    """How long transfers take that nothing delays."""

    def message_seconds(self, num_bytes: int) -> float:
        """A message between pipeline neighbours."""
        ...

    def exchange_seconds(self, num_bytes: int) -> float:
        """An exchange over the expert group in which this rank sends or receives `num_bytes`."""
        ...


@dataclass(frozen=True, slots=True)
class Wire:
    """A transfer of `b` bytes takes latency_seconds + b * seconds_per_byte."""

    latency_seconds: float
    seconds_per_byte: float

    def seconds(self, num_bytes: int) -> float:
        return self.latency_seconds + num_bytes * self.seconds_per_byte


@dataclass(frozen=True, slots=True)
class MeasuredWires:
    """`WireTimes` of two links."""

    message: Wire
    exchange: Wire

    def message_seconds(self, num_bytes: int) -> float:
        return self.message.seconds(num_bytes)

    def exchange_seconds(self, num_bytes: int) -> float:
        return self.exchange.seconds(num_bytes)


class Waited(NamedTuple):
    """Seconds of one wait: `starved`, then `blocked`."""

    blocked: float
    starved: float


def split_wait(seconds: float, wire_seconds: float | None) -> Waited:
    """Divide a wait that ended with the landing of a transfer; None: wire time unknown, all of it counts as
    on the wire.
    """
    if wire_seconds is None:
        return Waited(seconds, 0.0)
    blocked = min(seconds, wire_seconds)
    return Waited(blocked, seconds - blocked)
