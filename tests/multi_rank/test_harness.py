import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.multi_rank.harness import RankFailedError, run_ranks


def test_results_come_back_in_rank_order() -> None:
    # Oracle: the sum of 0..2, and arguments that no process could have guessed.
    def ranks_sum(rank: int, offset: int) -> tuple[int, float]:
        value = torch.tensor(float(rank + offset))
        dist.all_reduce(value)
        return rank, value.item()

    assert run_ranks(3, ranks_sum, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_the_first_failure_is_raised_with_its_rank_and_traceback() -> None:
    # Oracle: the only rank that raises on its own; the other one fails because of it.
    def fail(rank: int) -> None:
        if rank == 1:
            raise ValueError("deliberate")
        dist.barrier()

    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed first:.*in fail\n.*ValueError: deliberate"):
        run_ranks(2, fail)


def test_a_rank_that_vanishes_is_named() -> None:
    # Oracle: the exit code the rank chose.
    def vanish(rank: int) -> None:
        if rank == 0:
            os._exit(7)
        time.sleep(60)

    with pytest.raises(RankFailedError, match="rank 0 ended with exit code 7"):
        run_ranks(2, vanish)


def test_hanging_ranks_are_killed_and_named() -> None:
    # Oracle: the clock, and the process that no longer exists.
    started = time.monotonic()

    def hang(rank: int) -> None:
        if rank == 1:
            time.sleep(60)

    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 still ran after 2.0 s"):
        run_ranks(2, hang, timeout_seconds=2.0)
    assert time.monotonic() - started < 10
