"""The notice board over a dictionary."""

from mhc_dist.guard.board import Board, Notice, NoticeKind, RankState, RankStatus
from mhc_dist.guard.liveness import ProcessName


class DictStore:
    """The four operations of a key-value store; `get` of a missing key is an error, not a wait."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.content[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.content[key]

    def add(self, key: str, amount: int, /) -> int:
        total = int(self.content.get(key, b"0")) + amount
        self.content[key] = str(total).encode()
        return total

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.content for key in keys)


def make_process(rank: int, pid_space: str = "a") -> ProcessName:
    return ProcessName("node", pid_space, 100 + rank, 5)


def make_status(rank: int, pid_space: str = "a") -> RankStatus:
    return RankStatus(rank, make_process(rank, pid_space), RankState.RUNNING, 3, "recv.F c1 m0", 12.5)


def test_a_status_comes_back_as_it_was_written() -> None:
    """Oracle: equality of the dataclass; a rank that never joined is None."""
    store = DictStore()
    Board(store, 0, make_process(0)).publish(make_status(0))
    reader = Board(store, 1, make_process(1))
    assert reader.status(0) == make_status(0)
    assert reader.status(2) is None


def test_only_ranks_of_the_same_pid_space_are_local() -> None:
    """Oracle: three ranks, one of them in another container; each newcomer is listed once."""
    store = DictStore()
    boards = [Board(store, rank, make_process(rank, space)) for rank, space in enumerate("aab")]
    boards[0].join(make_status(0))
    assert boards[0].new_locals() == {}
    boards[1].join(make_status(1))
    boards[2].join(make_status(2, "b"))
    assert boards[0].new_locals() == {1: make_process(1)}
    assert boards[0].new_locals() == {}
    assert boards[1].new_locals() == {0: make_process(0)}
    assert boards[2].new_locals() == {}


def test_notices_are_read_once_in_order_and_past_a_gap() -> None:
    """Oracle: the order of posting; a number counted by an author that died before writing is passed over."""
    store = DictStore()
    author, reader = Board(store, 0, make_process(0)), Board(store, 1, make_process(1))
    first = Notice(NoticeKind.STOP, 0, (0,), "SIGTERM on rank 0")
    second = Notice(NoticeKind.DIED, 0, (2, 3), "rank 2 died")
    author.post(first)
    store.add("guard/notice/count", 1)
    assert reader.new_notices() == [first]
    assert reader.new_notices() == []
    author.post(second)
    assert reader.new_notices() == [second]
    assert author.new_notices() == [first, second]
