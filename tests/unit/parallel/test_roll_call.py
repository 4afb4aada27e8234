"""Ranks as threads over a store in memory: who came, and what is said when they do not fit together."""

from __future__ import annotations

import datetime
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from mhc_dist.parallel import join
from mhc_dist.parallel.join import meet
from mhc_dist.parallel.roll_call import Entry, Roll, RollCallError, roll_call


def entry(rank: int, world_size: int = 4, node: str = "node 0", **facts: str) -> Entry:
    return Entry(rank, world_size, node, f"host-{node}", 1000 + rank, {"the code": "abc", **facts})


def call(entries: list[Entry], timeout_seconds: float = 5.0) -> list[Roll | RollCallError]:
    """What every process gets, in the order of `entries`."""
    store = dist.HashStore()

    def one(own: Entry) -> Roll | RollCallError:
        try:
            return roll_call(store, own, timeout_seconds)
        except RollCallError as error:
            return error

    with ThreadPoolExecutor(len(entries)) as pool:
        return list(pool.map(one, entries))


def test_local_ranks_are_counted_on_uneven_nodes() -> None:
    """Oracle: slots 1 and 3 by hand. DeepSpeed's rank modulo slots would give 0, 1, 2, 0."""
    rolls = call([entry(0), *(entry(rank, node="node 1") for rank in (1, 2, 3))])
    for roll in rolls:
        assert isinstance(roll, Roll)
        assert [roll.local_rank(rank) for rank in range(4)] == [0, 0, 1, 2]
        assert [roll.local_world_size(rank) for rank in range(4)] == [1, 3, 3, 3]
        assert roll.num_nodes == 2


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(0), entry(1), entry(3)], ["1 of 4 ranks did not come within 1 s: 2", "train.join_seconds"]),
        ([entry(0), entry(1), entry(1), entry(2)], ["rank 1", "same --node-rank", "own port"]),
        ([entry(0), entry(1, world_size=2)], ["disagree on the number of processes", "counts 2", "hostfile"]),
        (
            [entry(0), entry(1), entry(2), entry(3, node="far", **{"the code": "xyz"})],
            ["disagree on the code", "most have abc", "rank 3 (host host-far, pid 1003) has xyz", "same"],
        ),
    ],
    ids=["missing", "doubled", "other-world", "other-code"],
)
def test_what_does_not_fit_is_told_to_all_who_came(entries: list[Entry], words: list[str]) -> None:
    """Oracle: the words that name each mistake and its remedy; one rank alone is its author."""
    answers = call(entries, timeout_seconds=1.0)
    assert all(isinstance(answer, RollCallError) for answer in answers), answers
    messages = {str(answer) for answer in answers}
    assert len(messages) == 1
    (message,) = messages
    assert [word for word in words if word not in message] == [], message
    assert [answer.author for answer in answers if isinstance(answer, RollCallError)].count(True) == 1


def test_a_world_of_one_needs_nobody() -> None:
    """Oracle: one entry, one place."""
    (roll,) = call([entry(0, world_size=1)])
    assert isinstance(roll, Roll)
    assert (roll.local_rank(0), roll.local_world_size(0)) == (0, 1)


def server(port: int = 0) -> dist.TCPStore:
    """Rank 0's side of a run's store."""
    seconds = datetime.timedelta(seconds=20)
    return dist.TCPStore("127.0.0.1", port, None, is_master=True, timeout=seconds, wait_for_workers=False)


def client(port: int, seconds: float = 20.0) -> dist.TCPStore:
    limit = datetime.timedelta(seconds=seconds)
    return dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=limit, wait_for_workers=False)


def test_a_node_that_is_back_first_waits_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: real stores on one port, one after the other. The old run's has called its roll and goes away
    while rank 1, started again, looks at it; on the next one rank 0 comes too."""
    old = server()
    port = old.port
    with ThreadPoolExecutor(2) as pool:
        stores = (old, client(port))
        assert all(
            pool.map(lambda own, store: roll_call(store, own, 5.0), (entry(0, 2), entry(1, 2)), stores)
        )
    del stores
    next_runs: list[Any] = []
    real = join._goes_away

    def goes_away(store: Any, deadline: float) -> bool:
        nonlocal old
        assert store.check(["roll_call/verdict"]), "it has found the old run"
        del old
        gone = real(store, deadline)
        next_runs.append(server(port))
        return gone

    monkeypatch.setattr(join, "_goes_away", goes_away)
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(meet, lambda seconds: client(port, seconds), entry(1, 2), 20.0)
        while not next_runs:
            assert not late.done(), late.result()
            time.sleep(0.01)
        first = pool.submit(roll_call, next_runs[0], entry(0, 2), 20.0)
        assert late.result()[1] == first.result()


def test_a_run_that_does_not_end_is_not_joined_late() -> None:
    """Oracle: the words that say what may be wrong; the first run's ranks are not disturbed."""
    store = dist.HashStore()
    rolls = [roll_call(store, entry(0, world_size=1), 5.0)]
    with pytest.raises(RollCallError, match=r"has begun with another rank 0.*own port, or end the first one"):
        meet(lambda seconds: store, entry(0, world_size=1), join_seconds=0.2)
    assert len(rolls[0].entries) == 1
