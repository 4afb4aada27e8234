"""Bytes to disk so that they are still there after the power went. No torch here.

The only file of this folder that writes checkpoint data: tests of full and broken disks replace these
functions, or put a small file system below them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

BLOCK_BYTES = 4 << 20


def write_file(path: Path, pieces: Iterable[memoryview | bytes]) -> tuple[int, str]:
    """Write a new file, force it to disk, and return its size and SHA-256.

    The checksum is of what was handed over, so that a byte lost on the way is found by whoever reads it.
    Raises OSError with the file's name.
    """
    try:
        return _write_new(path, pieces)
    except OSError as error:
        # Writing and syncing know a descriptor only; and a name in the constructor survives pickling.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_new(path: Path, pieces: Iterable[memoryview | bytes]) -> tuple[int, str]:
    digest, num_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for begin in range(0, len(view), BLOCK_BYTES):
                block = view[begin : begin + BLOCK_BYTES]
                digest.update(block)
                _write_all(descriptor, block)
            num_bytes += len(view)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return num_bytes, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force names that were made, changed or removed in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, block: memoryview) -> None:
    done = 0
    while done < len(block):
        done += os.write(descriptor, block[done:])
