"""What `--resume` asks for, and whether a checkpoint belongs to this run. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.checkpoint.folder import FOLDER, committed, find
from mhc_dist.checkpoint.manifest import CheckpointError, Manifest
from mhc_dist.config import RunConfig

MAY_CHANGE = frozenset({"model.balance_rate", "model.init_std"})
"""Keys of the model that do not change what its weights mean."""

MUST_STAY = ("data.sequence_length", "data.seed")
"""What a position in the training stream is counted in."""

MOST_NAMED = 12


@dataclass(frozen=True)
class Candidates:
    """Checkpoints to try, in this order."""

    folders: tuple[Path, ...]
    fall_back: bool
    """Whether a damaged one may be passed over for the next."""


def candidates(request: str, run_folder: Path) -> Candidates:
    """`auto`: the run's committed checkpoints, newest first. A number: that step. Anything else: a path.

    Raises CheckpointError when a step or path does not exist.
    """
    own = committed(run_folder / FOLDER)
    if request == "auto":
        return Candidates(tuple(own[step] for step in sorted(own, reverse=True)), fall_back=True)
    if request.isdecimal():
        if int(request) not in own:
            there = ", ".join(map(str, own)) or "none"
            raise CheckpointError(
                f"--resume {request}: {run_folder} has no committed checkpoint of step {request}; it has:"
                f" {there}. Name one of these, or say --resume auto."
            )
        return Candidates((own[int(request)],), fall_back=False)
    return Candidates((find(Path(request)),), fall_back=False)


def is_of_run(folder: Path, run_folder: Path) -> bool:
    """Whether a checkpoint lies in the run's own folder: then the run continues there."""
    return (run_folder / FOLDER).resolve() == folder.resolve().parent


def check_same_run(manifest: Manifest, config: RunConfig, corpus: str, folder: Path) -> None:
    """Raise CheckpointError unless the model is the same and the data position means the same."""
    wrong = [
        f"{key}={new} (saved with {old})"
        for key, old, new in differences(manifest.config, config)
        if (key.split(".")[0] in ("model", "residual") and key not in MAY_CHANGE) or key in MUST_STAY
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} was saved by another kind of run: {'; '.join(wrong[:MOST_NAMED])}. Set these back, or"
            " start a new run under another train.name."
        )
    if manifest.corpus != corpus:
        raise CheckpointError(
            f"{folder} was saved while training on other tokens (fingerprint {manifest.corpus}, now"
            f" {corpus}): its position in them means nothing here. Bring back that corpus (data.corpus,"
            " data.validation_fraction), or start a new run under another train.name."
        )


def changes(manifest: Manifest, config: RunConfig) -> list[str]:
    """What is set differently from the run that saved, `key old -> new`; where results lie does not count."""
    ignored = ("train.name", "train.output")
    return [
        f"{key} {old} -> {new}"
        for key, old, new in differences(manifest.config, config)
        if key not in ignored
    ]


def differences(saved: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(`section.key`, saved, now) of what differs; keys that the saved run did not know are not named."""
    now = config.model_dump(mode="json")
    for section, values in saved.items():
        for key, old in values.items():
            new = now.get(section, {}).get(key)
            if new != old:
                yield f"{section}.{key}", old, new
