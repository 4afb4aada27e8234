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


def forget_targets(output: Path, run: str, num_ranks: int) -> None:
    """Remove what ranks from `num_ranks` on have left: of an earlier start of the run, which had more of them
    and was killed. Prometheus would take them for ranks that are down.
    """
    for path in (output / TARGETS_FOLDER).glob(f"{run}.*.json"):
        # The run TINY has TINY.7.json; TINY.1.7.json is of the run TINY.1.
        rank = path.name.removeprefix(f"{run}.").removesuffix(".json")
        if rank.isdigit() and int(rank) >= num_ranks:
            path.unlink(missing_ok=True)


@contextmanager
def announced_target(output: Path, run: str, rank: int, host: str, port: int) -> Iterator[Path]:
    """Announce `host:port` as rank `rank` of `run` in `output`/.targets while the context lasts.

    A process that is killed leaves its file behind; Prometheus then sees the target down, which is true, and
    the next start of the run writes over it or forgets it.
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
