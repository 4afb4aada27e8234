"""A run's folder seen from the process that starts it: prepared before, read afterwards.

config.yaml     the resolved config that every rank reads
summary.json    written by rank 0 as its last act: the only proof of success
failure.json    written by the rank that failed first, if it could: {"rank", "exit_code", "message"}
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.config import RunConfig, dump_config

CONFIG_FILE = "config.yaml"
SUMMARY_FILE = "summary.json"
FAILURE_FILE = "failure.json"


@dataclass(frozen=True)
class Failure:
    """What a rank said about its end."""

    rank: int
    exit_code: int
    message: str


@contextmanager
def reserved(config: RunConfig) -> Iterator[None]:
    """Keep a second run of the same name out while this one lasts. Raises ValueError when it is taken."""
    _make_folder(config.train.output)
    # Beside the folder, not in it: the folder of an earlier run is moved aside.
    with (config.train.output / f".{config.train.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing to {config.folder}. Wait for it, or set train.name to another name."
            ) from None
        yield


def prepare(config: RunConfig) -> Path | None:
    """Make the run's folder with its config; returns where an earlier run of that name was moved, if any."""
    moved: Path | None = None
    if config.folder.exists():
        moved = _unused_name(config.folder)
        config.folder.rename(moved)
    _make_folder(config.folder)
    (config.folder / CONFIG_FILE).write_text(dump_config(config))
    return moved


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What rank 0 wrote at the end of a run that succeeded."""
    path = folder / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else None


def read_failure(folder: Path) -> Failure | None:
    """What the first rank to fail wrote, if it had the chance."""
    path = folder / FAILURE_FILE
    return Failure(**json.loads(path.read_text())) if path.exists() else None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the folder {folder}: {error.strerror}. Set train.output to a folder that can be"
            " written."
        ) from None


def _unused_name(folder: Path) -> Path:
    number = 1
    while (earlier := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return earlier
