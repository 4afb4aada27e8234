"""A mark of the code that a kept part depends on, so that what older code left is not taken for the same.
Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The package `mhc_dist`."""


def code_mark(folders_and_files: Iterable[Path]) -> str:
    """Hash of these Python files, and of those in these folders, at any depth. FileNotFoundError for a name
    that is neither: a renamed file must not go unnoticed.
    """
    files: set[Path] = set()
    for path in folders_and_files:
        files |= set(path.rglob("*.py")) if path.is_dir() else {path}
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
