"""Settings that must be made before any test module imports torch."""

from __future__ import annotations

import os

# Multi-rank tests fork. A forked child that inherits a used OpenMP pool waits forever for its threads, and
# with one thread there is no pool.
os.environ["OMP_NUM_THREADS"] = "1"
