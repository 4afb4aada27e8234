"""When skipped steps send a run back, and when it is given up."""

from __future__ import annotations

import pytest

from mhc_dist.guard.nonfinite import DivergedError, NonfiniteGuard


def test_only_skipped_steps_in_a_row_count() -> None:
    """Oracle: the sequence counted by hand."""
    guard = NonfiniteGuard(max_in_row=3, max_rollbacks=1)
    applied = [False, False, True, False, False, False]
    assert [guard.must_roll_back(step) for step in applied] == [False] * 5 + [True]


def test_after_a_return_counting_starts_anew() -> None:
    """Oracle: three more skipped steps, not one, before the next return."""
    guard = NonfiniteGuard(3, 2)
    for _ in range(3):
        guard.must_roll_back(False)
    guard.rolled_back(40)
    assert [guard.must_roll_back(False) for _ in range(3)] == [False, False, True]


def test_returns_to_one_checkpoint_are_bounded() -> None:
    """Oracle: the bound, and the words that say what to do."""
    guard = NonfiniteGuard(1, 2)
    for _ in range(2):
        assert guard.must_roll_back(False)
        guard.rolled_back(40)
    assert guard.must_roll_back(False)
    with pytest.raises(DivergedError, match=r"1 steps in a row .*max_rollbacks=2 .*step 40.*--resume STEP"):
        guard.rolled_back(40)


def test_a_newer_checkpoint_is_a_new_chance() -> None:
    """Oracle: no error, though the returns together are more than the bound."""
    guard = NonfiniteGuard(1, 1)
    for step in (40, 60, 80):
        guard.rolled_back(step)


def test_without_a_checkpoint_there_is_nowhere_to_go() -> None:
    """Oracle: the words that say what to do."""
    with pytest.raises(DivergedError, match=r"no checkpoint to return to.*peak_learning_rate"):
        NonfiniteGuard(1, 5).rolled_back(None)
