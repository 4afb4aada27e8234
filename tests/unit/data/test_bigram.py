"""The bigram baseline against counting by hand and against known entropies."""

import math
from itertools import pairwise

import numpy as np
import pytest

from mhc_dist.data import bigram as bigram_module
from mhc_dist.data.bigram import Bigram, bigram_loss


def slow_loss(train: list[int], validation: list[int], vocab_size: int) -> float:
    """The formula of the module's head with dictionaries and loops."""
    total = 0.0
    seconds = train[1:]
    for a, b in pairwise(validation):
        frequency = (seconds.count(b) + 1) / (len(seconds) + vocab_size)
        together = sum(pair == (a, b) for pair in pairwise(train))
        total -= math.log((together + frequency) / (train[:-1].count(a) + 1))
    return total / (len(validation) - 1)


def test_loss_equals_counting_by_hand() -> None:
    """Oracle: a slow loop over the definition, on random tokens with pairs that training never saw."""
    generator = np.random.default_rng(0)
    train = generator.integers(0, 12, 300).astype(np.uint8)
    validation = generator.integers(0, 16, 100).astype(np.uint8)
    expected = slow_loss(train.tolist(), validation.tolist(), 16)
    assert bigram_loss(train, validation, 16) == pytest.approx(expected, rel=1e-12)


def test_chunks_lose_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same loss whether counted in one chunk or in 43 small ones."""
    generator = np.random.default_rng(1)
    train = generator.integers(0, 50, 300).astype(np.uint16)
    validation = generator.integers(0, 50, 120).astype(np.uint16)
    whole = bigram_loss(train, validation, 50)
    monkeypatch.setattr(bigram_module, "CHUNK_NUM_TOKENS", 7)
    assert bigram_loss(train, validation, 50) == pytest.approx(whole, rel=1e-12)
    assert Bigram(train, 50).num_fitted_tokens == 299
    assert Bigram(train, 50, max_tokens=70).num_fitted_tokens == 70


def test_a_markov_chain_reaches_its_entropy() -> None:
    """Oracle: the entropy rate of a known two-state chain; a unigram model would be far off."""
    stay = 0.9
    generator = np.random.default_rng(2)
    flips = generator.random(200_000) > stay
    tokens = (np.cumsum(flips) % 2).astype(np.uint8)
    entropy = -(stay * math.log(stay) + (1 - stay) * math.log(1 - stay))
    assert bigram_loss(tokens[:150_000], tokens[150_000:], 256) == pytest.approx(entropy, abs=0.01)


def test_probabilities_add_up_to_one() -> None:
    """Oracle: the definition of a distribution, for a first token that was seen and one that was not."""
    train = np.array([0, 1, 0, 2, 0, 1, 3], dtype=np.uint8)
    model = Bigram(train, 5)
    for first in (0, 4):
        total = sum(math.exp(-model.loss(np.array([first]), np.array([second]))) for second in range(5))
        assert total == pytest.approx(1.0, rel=1e-12)


def test_a_big_vocabulary_stays_small_in_memory() -> None:
    """Oracle: 129280 tokens would need 134 GB as a table; here the pairs are as many as were seen."""
    generator = np.random.default_rng(3)
    train = generator.integers(0, 129_280, 10_000).astype(np.uint32)
    model = Bigram(train, 129_280)
    assert len(model._pairs) <= 9_999
    assert model.loss(train[:-1], train[1:]) < math.log(129_280) / 2


def test_too_few_tokens_are_refused() -> None:
    """Oracle: the message has the number."""
    one = np.zeros(1, dtype=np.uint8)
    with pytest.raises(ValueError, match="at least 2 training tokens, got 1"):
        Bigram(one, 256)
    with pytest.raises(ValueError, match="at least 2 validation tokens, got 1"):
        bigram_loss(np.zeros(9, dtype=np.uint8), one, 256)
