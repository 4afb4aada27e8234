"""Batches as a function of (seed, step, index); validation windows; permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_dist.data.batches import Batches, ValidationWindows
from mhc_dist.data.permutation import Permutation

TOKENS = np.arange(5000, dtype=np.uint16)
LENGTH = 16


@given(size=st.integers(1, 3000), key=st.text(max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_permutation_hits_every_value_once(size: int, key: str) -> None:
    """Oracle: the sorted values are the range itself."""
    permutation = Permutation(size, key)
    assert sorted(permutation[index] for index in range(size)) == list(range(size))


def test_a_permutation_looks_random() -> None:
    """Oracle: fixed points, neighbours kept and correlation are what a random permutation has."""
    size = 4096
    values = np.array([Permutation(size, "0 0")[index] for index in range(size)])
    assert np.sum(values == np.arange(size)) <= 6
    assert np.sum(np.diff(values) == 1) <= 6
    assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < 0.06
    other = np.array([Permutation(size, "0 1")[index] for index in range(size)])
    assert np.sum(values == other) <= 6


def test_an_epoch_visits_each_window_once() -> None:
    """Oracle: counting: no input token twice within an epoch, and nearly all of them in it."""
    batches = Batches(TOKENS, LENGTH, seed=3, sequences_per_step=1)
    seen = np.concatenate([batches.sequences(step, 0, 1).inputs[0] for step in range(batches.num_windows)])
    assert len(seen) == len(np.unique(seen)) == batches.num_windows * LENGTH
    assert len(seen) > len(TOKENS) - 3 * LENGTH
    second = np.concatenate(
        [batches.sequences(batches.num_windows + step, 0, 1).inputs[0] for step in range(batches.num_windows)]
    )
    assert len(np.unique(second)) == len(second)
    assert not np.array_equal(seen, second)
    assert seen[0] % LENGTH != second[0] % LENGTH, "both epochs cut the text at the same places"


def test_targets_are_inputs_shifted_by_one() -> None:
    """Oracle: tokens count up, so every target is its input plus one, at the ends of the split too."""
    batches = Batches(TOKENS, LENGTH, seed=0, sequences_per_step=8)
    for step in range(200):
        inputs, targets = batches.sequences(step, 0, 8)
        assert inputs.shape == targets.shape == (8, LENGTH)
        assert inputs.dtype == targets.dtype == np.int64
        assert np.array_equal(targets, inputs + 1)


def test_any_cut_of_a_step_gives_the_same_sequences() -> None:
    """Oracle: the whole step at once; a fresh object asked in another order, row by row, agrees."""
    whole = Batches(TOKENS, LENGTH, seed=7, sequences_per_step=12).sequences(41, 0, 12)
    other = Batches(TOKENS, LENGTH, seed=7, sequences_per_step=12)
    for first in reversed(range(0, 12, 3)):
        part = other.sequences(41, first, 3)
        assert np.array_equal(part.inputs, whole.inputs[first : first + 3])


def test_seeds_and_steps_differ() -> None:
    """Oracle: two seeds, and two steps, have different sequences."""
    first = Batches(TOKENS, LENGTH, seed=0, sequences_per_step=4)
    assert not np.array_equal(
        first.sequences(0, 0, 4).inputs, Batches(TOKENS, LENGTH, 1, 4).sequences(0, 0, 4).inputs
    )
    assert not np.array_equal(first.sequences(0, 0, 4).inputs, first.sequences(1, 0, 4).inputs)


def test_sequences_are_frozen() -> None:
    """Oracle: values written down once: a silent change here would break exact resume of old runs."""
    inputs = Batches(TOKENS, LENGTH, seed=0, sequences_per_step=4).sequences(5, 0, 4).inputs
    assert inputs[:, 0].tolist() == [584, 168, 1656, 4744]


def test_the_shortest_split_works_and_a_shorter_one_is_refused() -> None:
    """Oracle: 2L tokens hold one window at every offset; one token less is refused with the numbers."""
    batches = Batches(TOKENS[: 2 * LENGTH], LENGTH, seed=0, sequences_per_step=1)
    assert batches.num_windows == 1
    starts = {int(batches.sequences(step, 0, 1).inputs[0, 0]) for step in range(200)}
    assert starts == set(range(LENGTH))
    with pytest.raises(ValueError, match=r"has 31 tokens, data.sequence_length=16 needs at least 32"):
        Batches(TOKENS[:31], LENGTH, seed=0, sequences_per_step=1)


def test_validation_windows_are_apart_and_spread() -> None:
    """Oracle: no token in two windows, first and last tenth of the split both covered, same every time."""
    windows = ValidationWindows(TOKENS, LENGTH, num_sequences=20)
    inputs, targets = windows.sequences(0, 20)
    assert np.array_equal(targets, inputs + 1)
    assert len(np.unique(inputs)) == inputs.size
    assert inputs.min() < 500
    assert inputs.max() > 4500
    assert np.array_equal(windows.sequences(7, 3).inputs, inputs[7:10])


def test_all_validation_windows_cover_the_split() -> None:
    """Oracle: asking for every window gives the split back, token by token; one more is refused."""
    num_windows = (len(TOKENS) - 1) // LENGTH
    inputs = ValidationWindows(TOKENS, LENGTH, num_windows).sequences(0, num_windows).inputs
    assert np.array_equal(inputs.reshape(-1), TOKENS[: num_windows * LENGTH])
    with pytest.raises(
        ValueError, match=rf"asks for {num_windows + 1} sequences.* has {num_windows} windows"
    ):
        ValidationWindows(TOKENS, LENGTH, num_windows + 1)


def test_a_run_continues_the_stream_with_another_batch_size() -> None:
    """Oracle: one sequence after the other, as a run with batches of one takes them."""
    stream = Batches(TOKENS, LENGTH, seed=5, sequences_per_step=1)
    # Seven steps of 12 sequences, then five of 8, then skipping 16 that a rollback leaves behind.
    smaller = Batches(TOKENS, LENGTH, seed=5, sequences_per_step=8, done=(7, 84))
    skipping = Batches(TOKENS, LENGTH, seed=5, sequences_per_step=8, done=(12, 84 + 40 + 16))
    for batches, step, position in (
        (smaller, 7, 84),
        (smaller, 9, 100),
        (skipping, 12, 140),
        (skipping, 13, 148),
    ):
        got = batches.sequences(step, 2, 3).inputs
        want = [stream.sequences(position + 2 + row, 0, 1).inputs[0] for row in range(3)]
        assert np.array_equal(got, want), (step, position)
