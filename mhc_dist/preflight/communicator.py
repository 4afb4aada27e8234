"""What the measurements need of a message-passing library: mpi4py under mpirun, torch under torchrun."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Buffer = npt.NDArray[np.uint8]


class Communicator(Protocol):
    """All ranks of a preflight. Every method but `send` and `receive` is collective."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def library(self) -> str:
        """What carries the messages, with its version."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank, on every rank."""
        ...

    def barrier(self) -> None: ...
    def send(self, buffer: Buffer, to: int) -> None: ...
    def receive(self, buffer: Buffer, source: int) -> None: ...
    def all_to_all(self, sent: Buffer, received: Buffer) -> None:
        """Equal parts of `sent`, one to each rank."""
        ...

    def close(self) -> None: ...
