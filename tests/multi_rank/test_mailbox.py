"""Payloads through shared memory. Oracles: what was sent, and the number of slots that it needs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest
import torch
import torch.distributed as dist

from mhc_dist.bench.mailbox import Mailbox
from mhc_dist.bench.waiting import Asleep, Awake

ROWS, MESSAGE = 1, 2
SIZES = (7, 3000, 200_000)


def pair(
    folder: Path, first: Callable[[Mailbox], None], second: Callable[[Mailbox], None], seconds: float = 20.0
) -> None:
    """Run both ends, `first` in this process as rank 0. One waits awake, the other one asleep."""
    fork = multiprocessing.get_context("fork")
    peer = fork.Process(target=_end, args=(folder, 1, second, seconds))
    peer.start()
    try:
        _end(folder, 0, first, seconds)
        peer.join(20)
        assert peer.exitcode == 0
    finally:
        peer.kill()


def _end(folder: Path, rank: int, run: Callable[[Mailbox], None], seconds: float) -> None:
    waiting = (Awake(), Asleep())[rank]
    run(Mailbox(folder, dist.FileStore(str(folder / "store"), 2), rank, 2, seconds, waiting))


def named(turn: int, number: int, place: int) -> int:
    return 100 * turn + 10 * number + place


def values(number: int, size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.float32) + 1000 * number


def test_payloads_arrive_whole_in_any_order_and_leave_their_slots(tmp_path: Path) -> None:
    """Oracle: the values sent. 300 payloads of three sizes, five at a time, taken last to first, by kind:
    never more slots than are under way at once, five per size.
    """

    def send(mailbox: Mailbox) -> None:
        for turn in range(20):
            for place, size in enumerate(SIZES):
                for number in range(5):
                    mailbox.put(1, ROWS + number % 2, named(turn, number, place), values(number, size))
            mailbox.take(1, MESSAGE, turn, torch.empty(0))

    def receive(mailbox: Mailbox) -> None:
        for turn in range(20):
            for place, size in reversed(list(enumerate(SIZES))):
                for number in reversed(range(5)):
                    got = torch.empty(size)
                    note = mailbox.take(0, ROWS + number % 2, named(turn, number, place), got)
                    assert torch.equal(got, values(number, size))
                    assert note.size == 4 * size
            mailbox.put(0, MESSAGE, turn, torch.empty(0))

    pair(tmp_path, send, receive)
    assert len(list(tmp_path.glob("slot_0_*"))) <= 5 * len(SIZES)


def test_times_travel_with_the_payload_and_nothing_is_there_before_it_was_sent(tmp_path: Path) -> None:
    """Oracle: the times given to `put`."""

    def send(mailbox: Mailbox) -> None:
        assert not mailbox.has(1, ROWS, 0)
        mailbox.put(1, ROWS, 0, torch.ones(3), left=2.5, seconds=0.25)

    def receive(mailbox: Mailbox) -> None:
        got = torch.zeros(3)
        note = mailbox.take(0, ROWS, 0, got)
        assert (note.left, note.seconds, got.tolist()) == (2.5, 0.25, [1.0, 1.0, 1.0])

    pair(tmp_path, send, receive)


def test_a_silent_peer_and_another_size_are_errors_that_say_so(tmp_path: Path) -> None:
    """Oracle: the rank, the seconds and the bytes of the case."""

    def listen(mailbox: Mailbox) -> None:
        with pytest.raises(RuntimeError, match=r"rank 1 of the group sent nothing for 0\.2 s.* transfer 3"):
            mailbox.take(1, ROWS, 3, torch.empty(1))
        mailbox.put(1, ROWS, 0, torch.ones(2))

    def disagree(mailbox: Mailbox) -> None:
        while not mailbox.has(0, ROWS, 0):
            sleep(0.01)
        with pytest.raises(RuntimeError, match="sent 8 bytes, but 12 were expected"):
            mailbox.take(0, ROWS, 0, torch.empty(3))

    pair(tmp_path, listen, disagree, seconds=0.2)


def test_an_ended_peer_and_full_memory_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the contract. What an ended peer sent can still be taken; nothing can be sent to it."""
    fork = multiprocessing.get_context("fork")
    peer = fork.Process(
        target=_end, args=(tmp_path, 1, lambda mailbox: mailbox.put(0, ROWS, 0, torch.ones(3)), 20.0)
    )
    peer.start()
    mailbox = Mailbox(tmp_path, dist.FileStore(str(tmp_path / "store"), 2), 0, 2, 20.0, Asleep())
    peer.join(20)
    assert peer.exitcode == 0
    got = torch.zeros(3)
    mailbox.take(1, ROWS, 0, got)
    assert got.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="rank 1 of the group has ended"):
        mailbox.put(1, ROWS, 7, torch.ones(3))

    def full(handle: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"no room for a payload of 40000 bytes .*--shm-size"):
        mailbox.put(1, ROWS, 8, torch.ones(10_000))
