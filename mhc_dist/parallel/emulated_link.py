"""A slow network between ranks that share a host, for measuring overlap where there is none to be had.

On loopback an exchange is a copy by the same processor that computes, so hiding it gains nothing. Here the
real transfer takes place, and then its completion is held back until a link of given latency and bandwidth
would have delivered: alpha + bytes / beta after the link became free. Figures made with it say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class EmulatedLink:
    """One rank's way out: carries one payload at a time, in the order of issue.

    Delays count from this rank's own issue. That is what the ranks of an expert group see when they issue at
    nearly the same time, as they do when they run equal programs.
    """

    latency_seconds: float
    bytes_per_second: float
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    _free_at: float = field(default=0.0, init=False)

    def seconds(self, payload_bytes: int) -> float:
        """How long a payload occupies the link."""
        return self.latency_seconds + payload_bytes / self.bytes_per_second

    def send(self, payload_bytes: int) -> float:
        """Put a payload on the link; returns when it will have landed."""
        self._free_at = max(self.clock(), self._free_at) + self.seconds(payload_bytes)
        return self._free_at

    def wait(self, landing: float) -> None:
        """Do nothing until `landing`: this rank's processor is free meanwhile, as with a network card."""
        left = landing - self.clock()
        if left > 0:
            self.sleep(left)
