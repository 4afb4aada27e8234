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

from mhc_dist.checkpoint.resume import candidates, is_of_run
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


def prepare(config: RunConfig, resume: str | None = None) -> Path | None:
    """Make the run's folder with its config; returns where an earlier run of that name was moved, if any.

    A run that is resumed goes on in its own folder (`candidates` knows what may be resumed); what an earlier
    start has left there as its end is removed, and its config kept if it was another one. Raises ValueError
    when there is no such checkpoint.
    """
    moved: Path | None = None
    if resume is not None and _continues(config, resume):
        for name in (SUMMARY_FILE, FAILURE_FILE):
            (config.folder / name).unlink(missing_ok=True)
        _keep_config(config)
    elif config.folder.exists():
        moved = _unused_name(config.folder)
        config.folder.rename(moved)
    _make_folder(config.folder)
    (config.folder / CONFIG_FILE).write_text(dump_config(config))
    return moved


def _continues(config: RunConfig, resume: str) -> bool:
    found = candidates(resume, config.folder).folders
    # `auto` goes on in the folder even where there is no checkpoint yet: the same command may be repeated.
    return resume == "auto" or all(is_of_run(folder, config.folder) for folder in found)


def _keep_config(config: RunConfig) -> None:
    path = config.folder / CONFIG_FILE
    if path.exists() and path.read_text() != dump_config(config):
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        path.rename(kept)


def forget_failure(config: RunConfig) -> None:
    """Remove what the crash that was just reported has left: the next one has its own cause."""
    (config.folder / FAILURE_FILE).unlink(missing_ok=True)


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that has made all its steps: there is nothing to resume."""
    summary = read_summary(config.folder)
    return summary if summary is not None and summary["steps"] >= config.train.steps else None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What rank 0 wrote at the end of a run that succeeded."""
    path = folder / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else None


def read_failure(folder: Path) -> Failure | None:
    """What the first rank to fail wrote, if it had the chance: one that was killed while writing had none."""
    try:
        return Failure(**json.loads((folder / FAILURE_FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


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
