"""Train/validation split by file: a file's relative path alone decides which side it is on.

Adding, removing or renaming one file never moves another one across, so a validation loss stays comparable
while a corpus grows. Splitting inside files would leak: neighbouring windows share text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mhc_dist.data.corpus import TextFile


@dataclass(frozen=True)
class Split:
    """Both sides keep the order of the files they were made from."""

    train: tuple[TextFile, ...]
    validation: tuple[TextFile, ...]


def position(relative_path: str) -> float:
    """Where in [0, 1) a path falls: a hash, the same on every machine and Python version."""
    digest = hashlib.blake2b(relative_path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_files(files: Sequence[TextFile], validation_fraction: float) -> Split:
    """Files whose position is below `validation_fraction` are validation, the others are for training.

    A side that would stay empty (few files) gets the file nearest to it, which depends on the set of paths
    only. Raises ValueError for fewer than two files.
    """
    if len(files) < 2:
        raise ValueError(
            f"the corpus has {len(files)} text file(s), but the train/validation split is by file and needs"
            " at least 2. Add files, or cut one up with `split -n l/20 FILE FOLDER/`."
        )
    by_position = sorted(files, key=lambda file: (position(file.relative_path), file.relative_path))
    num_validation = sum(position(file.relative_path) < validation_fraction for file in files)
    num_validation = min(max(num_validation, 1), len(files) - 1)
    validation_paths = {file.relative_path for file in by_position[:num_validation]}
    return Split(
        train=tuple(file for file in files if file.relative_path not in validation_paths),
        validation=tuple(file for file in files if file.relative_path in validation_paths),
    )
