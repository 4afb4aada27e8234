"""What ranks tell each other about themselves: a notice board in the run's key-value store.

Every rank rewrites its own status (a heartbeat) and reads a constant number of keys per beat, so the load
on the store grows linearly with the number of ranks. Whoever finds out why the run must end posts one
notice; all others read it, which is how a thousand ranks agree on who died first.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from mhc_dist.guard.liveness import ProcessName


class KeyValueStore(Protocol):
    """What the board needs of a store; `torch.distributed.Store` has it.

    The store must be a client of its own (a second `TCPStore(host, port, is_master=False)`): a client
    carries out one operation at a time, and the main thread may wait in one for minutes.
    """

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...


class RankState(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"  # reached its end; its disappearance is no death
    FAILED = "failed"  # met an error of its own and said so
    ENDING = "ending"  # read a notice and is about to exit


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank's own account of itself. `action_since` is Unix time."""

    rank: int
    process: ProcessName
    state: RankState
    beat: int
    action: str
    action_since: float


class NoticeKind(StrEnum):
    DIED = "died"
    FAILED = "failed"
    STUCK = "stuck"
    STOP = "stop"  # a request, not an end: ranks finish what they are doing


@dataclass(frozen=True, slots=True)
class Notice:
    """Something every rank must know. `ranks` are those it is about, `author` the rank that posted it."""

    kind: NoticeKind
    author: int
    ranks: tuple[int, ...]
    text: str


class Board:
    """The notice board as one rank sees it. Not thread-safe: it belongs to the watching thread.

    Any method may raise what the store raises when it is gone (RuntimeError and OSError for TCPStore).
    """

    def __init__(self, store: KeyValueStore, rank: int, process: ProcessName) -> None:
        self._store = store
        self._rank = rank
        self._local_key = f"guard/local/{process.host}/{process.pid_space}"
        self._num_locals_read = 0
        self._num_notices_read = 0

    def join(self, status: RankStatus) -> None:
        """Publish the first status and enter the list of ranks that share this pid space."""
        self.publish(status)
        number = self._store.add(f"{self._local_key}/count", 1)
        self._store.set(f"{self._local_key}/{number}", json.dumps([self._rank, asdict(status.process)]))

    def publish(self, status: RankStatus) -> None:
        self._store.set(f"guard/status/{status.rank}", json.dumps(asdict(status)))

    def status(self, rank: int) -> RankStatus | None:
        """What `rank` last said, or None if it never joined."""
        content = self._read(f"guard/status/{rank}")
        if content is None:
            return None
        fields = json.loads(content)
        fields["process"] = ProcessName(**fields["process"])
        fields["state"] = RankState(fields["state"])
        return RankStatus(**fields)

    def new_locals(self) -> dict[int, ProcessName]:
        """Ranks of this pid space that joined since the last call, without this one."""
        found = {}
        while self._num_locals_read < self._store.add(f"{self._local_key}/count", 0):
            content = self._read(f"{self._local_key}/{self._num_locals_read + 1}")
            if content is None:
                break  # counted but not yet written
            self._num_locals_read += 1
            rank, process = json.loads(content)
            if rank != self._rank:
                found[rank] = ProcessName(**process)
        return found

    def post(self, notice: Notice) -> None:
        number = self._store.add("guard/notice/count", 1)
        self._store.set(f"guard/notice/{number}", json.dumps(asdict(notice)))

    def new_notices(self) -> list[Notice]:
        """Notices posted since the last call, oldest first, this rank's own included."""
        found = []
        count = self._store.add("guard/notice/count", 0)
        while self._num_notices_read < count:
            content = self._read(f"guard/notice/{self._num_notices_read + 1}")
            if content is None and self._num_notices_read + 1 == count:
                break  # counted but not yet written
            # A gap before later notices was left by an author killed between counting and writing.
            self._num_notices_read += 1
            if content is not None:
                fields = json.loads(content)
                kind, ranks = NoticeKind(fields["kind"]), tuple(fields["ranks"])
                found.append(Notice(kind, fields["author"], ranks, fields["text"]))
        return found

    def count_leaving(self) -> None:
        """This rank needs nothing from the store any more."""
        self._store.add("guard/leaving", 1)

    def num_leaving(self) -> int:
        return self._store.add("guard/leaving", 0)

    def _read(self, key: str) -> bytes | None:
        # `get` of a missing key waits for it, minutes in the case of TCPStore.
        return self._store.get(key) if self._store.check([key]) else None
