"""The baseline every model has to beat: predict a token from the one before it, by counting.

    p(b | a) = (count(a, b) + k p(b)) / (count(a) + k),   p(b) = (count(b) + 1) / (N + V)

k = 1: a pair never seen falls back on how frequent b is at all, which is kinder to the baseline than
adding a constant to all V cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mhc_dist.data.token_files import TokenArray

BACKOFF_WEIGHT = 1.0
MAX_FITTED_TOKENS = 1 << 26
CHUNK_NUM_TOKENS = 1 << 22

Counts = npt.NDArray[np.int64]


class Bigram:
    """Pair counts of a training split, kept sparse: memory grows with the pairs seen, not with V x V.

    Args:
        train: (N,) token ids.
        vocab_size: V, any size.
        max_tokens: above this many tokens, chunks spread evenly over the split are counted instead of all
            (`num_fitted_tokens` says how many).
    """

    def __init__(self, train: TokenArray, vocab_size: int, max_tokens: int = MAX_FITTED_TOKENS) -> None:
        if len(train) < 2:
            raise ValueError(f"a bigram model needs at least 2 training tokens, got {len(train)}.")
        self._vocab_size = vocab_size
        self._token_counts: Counts = np.zeros(vocab_size, dtype=np.int64)
        self._first_counts: Counts = np.zeros(vocab_size, dtype=np.int64)
        pairs: Counts = np.empty(0, dtype=np.int64)
        pair_counts: Counts = np.empty(0, dtype=np.int64)
        for chunk in _chunks(train, max_tokens):
            self._token_counts += np.bincount(chunk[1:], minlength=vocab_size)
            self._first_counts += np.bincount(chunk[:-1], minlength=vocab_size)
            found, found_counts = np.unique(chunk[:-1] * vocab_size + chunk[1:], return_counts=True)
            pairs, pair_counts = _merge(pairs, pair_counts, found, found_counts)
        self._pairs = pairs
        self._pair_counts = pair_counts
        self.num_fitted_tokens = int(self._token_counts.sum())

    def loss(self, inputs: npt.NDArray[np.integer], targets: npt.NDArray[np.integer]) -> float:
        """Mean -ln p(target | input) over all places of two equally shaped arrays: nats per token."""
        assert inputs.shape == targets.shape, (inputs.shape, targets.shape)
        assert inputs.size > 0
        first = inputs.reshape(-1).astype(np.int64)
        second = targets.reshape(-1).astype(np.int64)
        codes = first * self._vocab_size + second
        places = np.minimum(np.searchsorted(self._pairs, codes), len(self._pairs) - 1)
        counts = np.where(self._pairs[places] == codes, self._pair_counts[places], 0)
        frequency = (self._token_counts[second] + 1) / (self.num_fitted_tokens + self._vocab_size)
        probability = (counts + BACKOFF_WEIGHT * frequency) / (self._first_counts[first] + BACKOFF_WEIGHT)
        return float(-np.log(probability).mean())


def bigram_loss(train: TokenArray, validation: TokenArray, vocab_size: int) -> float:
    """Nats per token of a bigram model counted on `train`, over the whole of `validation`."""
    if len(validation) < 2:
        raise ValueError(f"a bigram loss needs at least 2 validation tokens, got {len(validation)}.")
    bigram = Bigram(train, vocab_size)
    total = 0.0
    for chunk in _chunks(validation, max_tokens=len(validation)):
        total += bigram.loss(chunk[:-1], chunk[1:]) * (len(chunk) - 1)
    return total / (len(validation) - 1)


def _chunks(tokens: TokenArray, max_tokens: int) -> Iterator[npt.NDArray[np.int64]]:
    """Pieces that overlap by one token, so that no pair is lost between two of them."""
    starts = range(0, len(tokens) - 1, CHUNK_NUM_TOKENS)
    num_kept = len(starts)
    if len(tokens) > max_tokens:
        num_kept = min(num_kept, max(1, max_tokens // CHUNK_NUM_TOKENS))
    for number in range(num_kept):
        start = starts[number * len(starts) // num_kept]
        yield tokens[start : start + CHUNK_NUM_TOKENS + 1].astype(np.int64)


def _merge(pairs: Counts, counts: Counts, more_pairs: Counts, more_counts: Counts) -> tuple[Counts, Counts]:
    merged, places = np.unique(np.concatenate([pairs, more_pairs]), return_inverse=True)
    total = np.zeros(len(merged), dtype=np.int64)
    np.add.at(total, places, np.concatenate([counts, more_counts]))
    return merged, total
