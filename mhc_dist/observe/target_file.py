"""Tells Prometheus where a rank serves its metrics: a file per rank for `file_sd_configs`.

Written by each rank for itself, with the port that it really got, so that no rank has to know about others.
All runs share one folder because Prometheus allows a wildcard in the last part of a path only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TARGETS_FOLDER = ".targets"


@contextmanager
def announced_target(output: Path, run: str, rank: int, host: str, port: int) -> Iterator[Path]:
    """Announce `host:port` as rank `rank` of `run` in `output`/.targets while the context lasts.

    A process that is killed leaves its file behind; Prometheus then sees the target down, which is true, and
    the next run of the same name and size writes over it.
    """
    folder = output / TARGETS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run}.{rank}.json"
    # Prometheus reads on every change: it must never see half a file.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps([{"targets": [f"{host}:{port}"], "labels": {"run": run}}]) + "\n")
    os.replace(unfinished, path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
