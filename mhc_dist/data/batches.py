"""Which tokens a step trains on: a pure function of (seed, step, index). Resuming needs no saved state.

Shapes: S = sequences, L = sequence length. A window is L + 1 consecutive tokens: L inputs and, shifted by
one, L targets.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mhc_dist.data.permutation import Permutation
from mhc_dist.data.token_files import TokenArray

TokenIds = npt.NDArray[np.int64]


class Sequences(NamedTuple):
    """Token ids, (S, L) int64 each: target j of a row is the token that follows its input j."""

    inputs: TokenIds
    targets: TokenIds


def check_num_tokens(side: str, num_tokens: int, sequence_length: int) -> None:
    """Refuse a split that is too short for a single window at any offset."""
    if num_tokens < 2 * sequence_length:
        raise ValueError(
            f"the {side} split has {num_tokens} tokens, data.sequence_length={sequence_length} needs at"
            f" least {2 * sequence_length}. Add text, change data.validation_fraction, or lower"
            " data.sequence_length."
        )


class Batches:
    """Training batches: every epoch visits each window once, in a new random order.

    Sequence `index` of step `step` (counted from 0) is number `step * sequences_per_step + index` of an
    endless stream of epochs (or counted on from `done`). An epoch cuts the tokens into non-overlapping
    windows starting at a random offset, so that over epochs every token is seen at every place in a window.

    Args:
        tokens: the training split.
        sequence_length: L.
        seed: data.seed.
        sequences_per_step: the global batch: data ranks x microbatches x sequences per microbatch.
        done: where a run stands that did not start here: its number of steps, and of sequences of the stream
            these have taken. Steps from there on take what follows, whatever the size of a batch was before.
    """

    def __init__(
        self,
        tokens: TokenArray,
        sequence_length: int,
        seed: int,
        sequences_per_step: int,
        done: tuple[int, int] = (0, 0),
    ) -> None:
        check_num_tokens("training", len(tokens), sequence_length)
        assert sequences_per_step >= 1, sequences_per_step
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._seed = seed
        self._sequences_per_step = sequences_per_step
        self._done_steps, self._done_sequences = done
        # The last input needs a target, hence -1; the offset takes up to L - 1 tokens more.
        self.num_windows = (len(tokens) - 1 - (sequence_length - 1)) // sequence_length

    def sequences(self, step: int, first: int, count: int) -> Sequences:
        """Sequences first .. first+count-1 of the global batch of `step`; (count, L) int64 twice."""
        assert step >= self._done_steps, (step, self._done_steps)
        assert 0 <= first <= first + count <= self._sequences_per_step, (
            first,
            count,
            self._sequences_per_step,
        )
        position = self._done_sequences + (step - self._done_steps) * self._sequences_per_step + first
        starts = [self._start(position + row) for row in range(count)]
        return _cut(self._tokens, starts, self._sequence_length)

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.num_windows)
        key = f"{self._seed} {epoch}"
        digest = hashlib.blake2b(f"offset {key}".encode(), digest_size=8).digest()
        offset = int.from_bytes(digest, "big") % self._sequence_length
        return offset + Permutation(self.num_windows, key)[index] * self._sequence_length


class ValidationWindows:
    """The same `num_sequences` windows at every validation, spread evenly over the whole split.

    Spread, because the first windows of a long split would all come from its first few files.

    Args:
        tokens: the validation split.
        sequence_length: L.
        num_sequences: how many windows one validation uses in all.
    """

    def __init__(self, tokens: TokenArray, sequence_length: int, num_sequences: int) -> None:
        check_num_tokens("validation", len(tokens), sequence_length)
        num_windows = (len(tokens) - 1) // sequence_length
        if not 1 <= num_sequences <= num_windows:
            raise ValueError(
                f"a validation asks for {num_sequences} sequences, but the validation split has {num_windows}"
                f" windows of data.sequence_length={sequence_length}. Lower train.validation_batches or the"
                " batch, or raise data.validation_fraction."
            )
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._num_windows = num_windows
        self.num_sequences = num_sequences

    def sequences(self, first: int, count: int) -> Sequences:
        """Windows first .. first+count-1; (count, L) int64 twice. They never overlap."""
        assert 0 <= first <= first + count <= self.num_sequences, (first, count, self.num_sequences)
        windows = [row * self._num_windows // self.num_sequences for row in range(first, first + count)]
        return _cut(self._tokens, [w * self._sequence_length for w in windows], self._sequence_length)


def _cut(tokens: TokenArray, starts: list[int], sequence_length: int) -> Sequences:
    windows = np.empty((len(starts), sequence_length + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        windows[row] = tokens[start : start + sequence_length + 1]
    return Sequences(np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:]))
