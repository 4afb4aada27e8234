"""Oracle: the difference put in by hand; every rank must name it."""

from __future__ import annotations

import pytest

from mhc_dist.parallel.agreement import check_agreement
from tests.multi_rank.harness import run_ranks


def compare(rank: int, odd_rank: int | None) -> str:
    facts = {"torch": "2.13.0", "the program of a step": "bbbb" if rank == odd_rank else "aaaa"}
    try:
        check_agreement(facts)
    except ValueError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize("odd_rank", [0, 2])
def test_a_different_program_is_named_on_every_rank(odd_rank: int) -> None:
    messages = run_ranks(3, compare, odd_rank)
    assert len(set(messages)) == 1
    for part in ("the program of a step", "aaaa", f"rank {odd_rank} has bbbb", "same"):
        assert part in messages[0]


def test_equal_facts_pass() -> None:
    assert run_ranks(3, compare, None) == ["agreed"] * 3
