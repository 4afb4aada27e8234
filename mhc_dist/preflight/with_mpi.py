"""Messages over MPI, for a preflight that mpirun started."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from mhc_dist.preflight.communicator import Buffer


class MpiCommunicator:
    """All processes of this mpirun."""

    def __init__(self) -> None:
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self.library = MPI.Get_library_version().partition(",")[0].strip()

    def gather(self, value: Any) -> list[Any]:
        return list(self._world.allgather(value))

    def barrier(self) -> None:
        self._world.Barrier()

    def send(self, buffer: Buffer, to: int) -> None:
        self._world.Send([buffer, MPI.BYTE], dest=to)

    def receive(self, buffer: Buffer, source: int) -> None:
        self._world.Recv([buffer, MPI.BYTE], source=source)

    def all_to_all(self, sent: Buffer, received: Buffer) -> None:
        self._world.Alltoall([sent, MPI.BYTE], [received, MPI.BYTE])

    def close(self) -> None:
        self._world.Barrier()
