"""A folder that appears under its name complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A place to write into that becomes `path` when the block ends without an error.

    Raises ValueError when `path` exists, or cannot be written.
    """
    if path.exists():
        raise ValueError(f"{path} already exists. Remove it, or choose another --output.")
    building = path.with_name(f"{path.name}.building-{os.getpid()}")
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
