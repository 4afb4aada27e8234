"""A random permutation of {0 .. size-1} that is computed, not stored: O(1) memory for any corpus.

A Feistel network is a bijection on pairs of half-words whatever its round function is. Values that fall
outside the range are sent through again ("cycle walking") until they land inside; since the network is a
bijection on the larger set, this is one on the smaller.
"""

from __future__ import annotations

import hashlib

NUM_ROUNDS = 6


class Permutation:
    """`permutation[i]` for i in [0, size): each value of the range exactly once.

    Args:
        size: how many values, at least 1.
        key: permutations with different keys are unrelated.
    """

    def __init__(self, size: int, key: str) -> None:
        assert size >= 1, size
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        base = hashlib.blake2b(key.encode(), digest_size=16).digest()
        self._round_keys = [base + bytes([number]) for number in range(NUM_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self.size, (index, self.size)
        value = self._scramble(index)
        while value >= self.size:
            value = self._scramble(value)
        return value

    def _scramble(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for round_key in self._round_keys:
            digest = hashlib.blake2b(right.to_bytes(8, "big"), digest_size=8, key=round_key).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & self._mask)
        return (left << self._half_bits) | right
