"""Before the first collective: is everybody here, and do all mean the same run?

A collective with a missing or a doubled rank only waits, and its message, minutes later, names nobody. So the
ranks first write themselves into the run's key-value store. Rank 0 reads the list, and everyone gets its
verdict: the whole list, or one sentence about what is wrong.

    key                       value
    roll_call/RANK/claims     how many processes say that they are RANK
    roll_call/RANK            the rank's own entry
    roll_call/verdict         rank 0's answer
    roll_call/heard           how many ranks have read it
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

POLL_SECONDS = 0.05
VERDICT_MARGIN_SECONDS = 15.0
"""How long rank 0 may take to answer after its own time is up."""


HEARD_SECONDS = 5.0
"""How long rank 0 stays for the others to read that the run cannot start."""


class Store(Protocol):
    """What a roll call needs of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One process about itself. `node` tells nodes apart; the facts must be equal on all ranks."""

    rank: int
    world_size: int
    node: str
    host: str
    pid: int
    facts: Mapping[str, str]

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Roll:
    """All processes of a run, by rank."""

    entries: tuple[Entry, ...]

    def local_rank(self, rank: int) -> int:
        """Position of `rank` among the ranks of its node: 0 for the lowest, with uneven nodes as well."""
        return self._node_of(rank).index(rank)

    def local_world_size(self, rank: int) -> int:
        return len(self._node_of(rank))

    @property
    def num_nodes(self) -> int:
        return len({entry.node for entry in self.entries})

    def _node_of(self, rank: int) -> list[int]:
        node = self.entries[rank].node
        return [entry.rank for entry in self.entries if entry.node == node]


class RollCallError(ValueError):
    """The run cannot start. `author` is True on the rank that found out: one of them is enough to tell."""

    def __init__(self, message: str, *, author: bool) -> None:
        super().__init__(message)
        self.author = author


class UnderWayError(Exception):
    """The roll of this store was called before this process came: it belongs to a run without us."""


def roll_call(store: Store, own: Entry, timeout_seconds: float) -> Roll:
    """Wait until all ranks of the run have said who they are. Collective over the world.

    Raises RollCallError, with the same sentence on every rank that came, when ranks are missing after
    `timeout_seconds`, two processes claim one rank, or facts differ; UnderWayError when this rank is there
    already and the run has begun.
    """
    num_claims = store.add(f"roll_call/{own.rank}/claims", 1)
    if num_claims == 1:
        store.set(f"roll_call/{own.rank}", json.dumps(asdict(own)))
    if own.rank == 0 and num_claims == 1:
        content = _verdict(store, own, timeout_seconds)
        store.set("roll_call/verdict", json.dumps(content))
        if content["problem"] is not None:
            # The store goes away with this process.
            _wait_until_heard(store, len(content["entries"]) - 1)
    else:
        content = _verdict_of_rank_0(store, own, timeout_seconds)
    if content["problem"] is not None:
        raise RollCallError(content["problem"], author=own.rank == 0)
    if num_claims > 1:
        raise UnderWayError
    return Roll(tuple(Entry(**fields) for fields in content["entries"]))


def _verdict(store: Store, own: Entry, timeout_seconds: float) -> dict[str, Any]:
    entries = _collect(store, own.world_size, timeout_seconds)
    problem = problem_with(entries, own.world_size, _doubled(store, own.world_size), timeout_seconds)
    return {"problem": problem, "entries": [asdict(entry) for entry in entries]}


def _collect(store: Store, world_size: int, timeout_seconds: float) -> list[Entry]:
    """The entries that arrive in time, by rank. A doubled rank or a different world ends the wait."""
    deadline = time.monotonic() + timeout_seconds
    entries: dict[int, Entry] = {}
    while len(entries) < world_size and time.monotonic() < deadline:
        for rank in range(world_size):
            if rank not in entries and store.check([f"roll_call/{rank}"]):
                entries[rank] = Entry(**json.loads(store.get(f"roll_call/{rank}")))
        if any(entry.world_size != world_size for entry in entries.values()) or _doubled(store, world_size):
            break
        time.sleep(POLL_SECONDS)
    return [entries[rank] for rank in sorted(entries)]


def _doubled(store: Store, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if store.add(f"roll_call/{rank}/claims", 0) > 1]


def _verdict_of_rank_0(store: Store, own: Entry, timeout_seconds: float) -> dict[str, Any]:
    try:
        store.wait(["roll_call/verdict"], timedelta(seconds=timeout_seconds + VERDICT_MARGIN_SECONDS))
        verdict: dict[str, Any] = json.loads(store.get("roll_call/verdict"))
        store.add("roll_call/heard", 1)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RollCallError(
            f"{own} waited for rank 0, which did not answer: {reason}. Rank 0's output says why it ended; if"
            " it was never started, start all processes of one run together.",
            author=True,
        ) from error
    return verdict


def _wait_until_heard(store: Store, num_others: int) -> None:
    deadline = time.monotonic() + HEARD_SECONDS
    while store.add("roll_call/heard", 0) < num_others and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def problem_with(
    entries: Sequence[Entry], world_size: int, doubled: Sequence[int], timeout_seconds: float
) -> str | None:
    """What is wrong with those who came, with the remedy; None if nothing is."""
    if doubled:
        first = ", ".join(str(entry) for entry in entries if entry.rank in doubled)
        return (
            f"several processes say that they are rank {', '.join(map(str, doubled))}"
            f"{'; the first was ' if first else ''}{first}."
            " Were two nodes started with the same --node-rank, or a second run on the same master port?"
            " Give every node its own rank, and every run its own port."
        )
    sizes = {entry.world_size for entry in entries}
    if len(sizes) > 1:
        listed = "; ".join(f"{entry} counts {entry.world_size}" for entry in _one_per_value(entries))
        return (
            f"ranks disagree on the number of processes: {listed}. Start all nodes with the same hostfile and"
            " the same configuration."
        )
    missing = sorted(set(range(world_size)) - {entry.rank for entry in entries})
    if missing:
        came = ", ".join(str(entry) for entry in entries)
        return (
            f"{len(missing)} of {world_size} ranks did not come within {timeout_seconds:g} s:"
            f" {', '.join(map(str, missing))}. Here are {came}. Were the other nodes started, with the same"
            " hostfile, and can they reach the master address? If they only need longer, raise"
            " train.join_seconds."
        )
    for name in entries[0].facts:
        values = [entry.facts.get(name, "unknown") for entry in entries]
        ((common, _),) = Counter(values).most_common(1)
        others = [entry for entry, value in zip(entries, values, strict=True) if value != common]
        if others:
            listed = ", ".join(f"{entry} has {entry.facts.get(name, 'unknown')}" for entry in others)
            return (
                f"ranks disagree on {name}: most have {common}, but {listed}. Start all of them with the same"
                " configuration, code and library versions."
            )
    return None


def _one_per_value(entries: Sequence[Entry]) -> list[Entry]:
    return list({entry.world_size: entry for entry in entries}.values())
