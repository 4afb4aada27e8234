"""Where the checkpoints of a run lie and what their names say. No torch here.

runs/NAME/checkpoints/
    step_00000040/               committed: the rename to this name was the commit
    step_00000060.tmp/           being written, or left by a run that died: never loaded
    step_00000020.damaged/       set aside when its checksums were found wrong
    step_00000080.superseded/    set aside when the run was resumed from an earlier step
    latest -> step_00000040      for people and scripts; a resuming run looks for itself
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from mhc_dist.checkpoint.manifest import MANIFEST_FILE, CheckpointError

FOLDER = "checkpoints"
LATEST = "latest"
UNCOMMITTED = ".tmp"
DAMAGED = ".damaged"
SUPERSEDED = ".superseded"

_COMMITTED = re.compile(r"step_(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:08d}"


def committed(checkpoints: Path) -> dict[int, Path]:
    """Committed checkpoints by step, oldest first; none where the folder does not exist."""
    found = {}
    if checkpoints.is_dir():
        for folder in checkpoints.iterdir():
            match = _COMMITTED.fullmatch(folder.name)
            if match and folder.is_dir():
                found[int(match[1])] = folder
    return dict(sorted(found.items()))


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run's folder.

    Raises CheckpointError when there is none, with what is there instead.
    """
    try:
        if path.name.endswith(UNCOMMITTED):
            raise CheckpointError(
                f"{path} was never committed: a run died while it wrote it. Use another one."
            )
        if (path / MANIFEST_FILE).is_file():
            return path.resolve()
        for checkpoints in (path / FOLDER, path):
            if found := committed(checkpoints):
                return found[max(found)].resolve()
        raise CheckpointError(_why_not(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}.") from None


def _why_not(path: Path) -> str:
    """What is there instead of a checkpoint: nothing, a file, what never became one, something else."""
    if not path.exists():
        there = committed(path.parent)
        if not there:
            return f"{path} does not exist. Name a run's folder or one of its {FOLDER}/step_* folders."
        return f"{path} does not exist; {path.parent} has the steps {', '.join(map(str, there))}."
    if not path.is_dir():
        return (
            f"{path} is a file, and a checkpoint is a folder. Name a run's folder or one of its"
            f" {FOLDER}/step_* folders."
        )
    left = sorted(entry.name for folder in (path / FOLDER, path) for entry in folder.glob("step_*"))
    if left:
        return (
            f"{path} has no committed checkpoint: {', '.join(left)} never became one or was set aside. Name"
            " another run."
        )
    return (
        f"{path} holds no committed checkpoint and is none. Name a run's folder or one of its {FOLDER}/step_*"
        " folders."
    )


def set_aside(folder: Path, mark: str) -> Path:
    """Rename a committed checkpoint so that it is no longer one; returns its new name."""
    number, target = 1, folder.with_name(folder.name + mark)
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{mark}-{number}")
    folder.rename(target)
    return target


def point_latest(checkpoints: Path, folder: Path) -> None:
    """Let `latest` name `folder`, in one rename."""
    pointer = checkpoints / f"{LATEST}{UNCOMMITTED}"
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    os.replace(pointer, checkpoints / LATEST)


def remove_uncommitted(checkpoints: Path) -> list[Path]:
    """Delete what earlier processes of this run left unfinished; only when nobody is writing."""
    leftovers = sorted(checkpoints.glob(f"step_*{UNCOMMITTED}")) if checkpoints.is_dir() else []
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return leftovers


def retire(folder: Path) -> None:
    """Delete a committed checkpoint. Half deleted, it no longer looks like one."""
    leaving = folder.with_name(folder.name + UNCOMMITTED)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def to_delete(steps: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Steps that retention gives up: all but the newest `keep_last` and every multiple of `keep_every`.

    0 means no such rule: keep_last=0 keeps all, keep_every=0 keeps none for good.
    """
    if keep_last == 0:
        return []
    old = sorted(steps)[:-keep_last]
    return [step for step in old if keep_every == 0 or step % keep_every]
