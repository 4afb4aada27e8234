"""A store that knows since when it has been waiting for an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mhc_dist.guard.board import KeyValueStore


class TimedStore:
    """Passes everything on. `busy_since` may be read by any thread; the rest belongs to one."""

    def __init__(self, store: KeyValueStore) -> None:
        self._store = store
        self.busy_since: float | None = None
        """When the operation under way began (monotonic), or None."""

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.busy_since = time.monotonic()
        try:
            yield
        finally:
            self.busy_since = None

    def set(self, key: str, value: str, /) -> None:
        with self._busy():
            self._store.set(key, value)

    def get(self, key: str, /) -> bytes:
        with self._busy():
            return self._store.get(key)

    def add(self, key: str, amount: int, /) -> int:
        with self._busy():
            return self._store.add(key, amount)

    def check(self, keys: list[str], /) -> bool:
        with self._busy():
            return self._store.check(keys)
