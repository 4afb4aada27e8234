"""Appending to logs on a disk that may be full: what is asked for is there as a whole, or not at all.

Readers take half a line at a log's end for a process that was killed; in the middle it would be damage.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path


def append(file: FileIO, text: str) -> None:
    """Append all of `text` to a file that nobody else writes, or nothing. Raises OSError."""
    size = os.fstat(file.fileno()).st_size
    left = memoryview(text.encode())
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        file.truncate(size)
        raise


def append_to(path: Path, text: str) -> None:
    """`append`, for files that are written seldom; the file is made if missing."""
    with path.open("ab", buffering=0) as file:
        append(file, text)


def replace(path: Path, text: str) -> None:
    """Give `path` another content; where that cannot be written, it keeps the one it has. Raises OSError."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
