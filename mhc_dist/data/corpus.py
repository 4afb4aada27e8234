"""Which files a corpus consists of. Standard library only; nothing is read here but folder listings.

A corpus is a list of files in a fixed order (by relative path), so that every process, whatever order its
file system lists folders in, sees the same text.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"
"""The corpus that is always there: sources of the running interpreter's standard library."""

# Tests are two thirds of the library and often missing from system packages. encodings and pydoc_data are
# generated tables, not text anybody wrote. Installed packages are not the standard library.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of a corpus. `relative_path` uses / on every system: it orders files and decides the split."""

    relative_path: str
    path: Path
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file that was found but is not used, and why."""

    relative_path: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """Files in order of their relative path, and what was left out."""

    name: str
    root: Path
    files: tuple[TextFile, ...]
    skipped: tuple[SkippedFile, ...] = ()


def python_stdlib() -> Corpus:
    """The .py files of the running interpreter's standard library, without tests and generated tables.

    Inside a virtual environment this is still the library of the interpreter it was made from.
    """
    root = Path(sysconfig.get_path("stdlib"))
    name = f"standard library of Python {platform.python_version()}"
    if not root.is_dir():
        raise ValueError(
            f"data.corpus={PYTHON_STDLIB}: the standard library is not a folder here ({root})."
            " Set data.corpus to a folder of text files."
        )

    def is_wanted_folder(folder: str) -> bool:
        return folder not in STDLIB_SKIPPED_FOLDERS and not folder.startswith((".", "config-"))

    files, _ = _walk(root, is_wanted_folder, lambda file: file.endswith(".py"))
    if not files:
        raise ValueError(
            f"data.corpus={PYTHON_STDLIB}: found 0 .py files under {root}"
            " (an interpreter with a zipped library?). Set data.corpus to a folder of text files."
        )
    return Corpus(name, root, files)


def text_folder(root: Path, excluded: Path | None = None) -> Corpus:
    """Every visible, non-empty file under `root`; whether it is text is decided when it is read.

    Hidden files and folders, `__pycache__` and `excluded` (a token cache that happens to lie inside) are
    not listed at all: they are nobody's corpus. Links to folders are not followed.
    """
    if root.is_file():
        raise ValueError(
            f"data.corpus={root} is a file, not a folder. The train/validation split is by file: make a"
            f" folder of at least 2 files, for example with `split -n l/20 {root.name} FOLDER/`."
        )
    if not root.is_dir():
        raise ValueError(
            f"data.corpus={root} does not exist. Give a folder of text files, the output of"
            f" `mhc-dist data prepare`, or {PYTHON_STDLIB}."
        )
    excluded_path = excluded.resolve() if excluded is not None else None

    def is_wanted_folder(folder: str) -> bool:
        return not folder.startswith(".") and folder != "__pycache__"

    files, skipped = _walk(root, is_wanted_folder, lambda file: not file.startswith("."), excluded_path)
    if not files:
        raise ValueError(
            f"data.corpus={root} holds 0 usable files ({len(skipped)} empty or not regular)."
            " Put text files (UTF-8) into it."
        )
    return Corpus(f"folder {root.name}", root, files, skipped)


def _walk(
    root: Path,
    is_wanted_folder: Callable[[str], bool],
    is_wanted_file: Callable[[str], bool],
    excluded: Path | None = None,
) -> tuple[tuple[TextFile, ...], tuple[SkippedFile, ...]]:
    files: list[TextFile] = []
    skipped: list[SkippedFile] = []
    for folder, folder_names, file_names in os.walk(root, onerror=_refuse_unreadable):
        folder_names[:] = [
            name
            for name in folder_names
            if is_wanted_folder(name) and (excluded is None or Path(folder, name).resolve() != excluded)
        ]
        for name in filter(is_wanted_file, file_names):
            path = Path(folder, name)
            relative_path = path.relative_to(root).as_posix()
            if not path.is_file():
                skipped.append(SkippedFile(relative_path, "not a regular file"))
                continue
            stat = path.stat()
            if stat.st_size == 0:
                skipped.append(SkippedFile(relative_path, "empty"))
                continue
            files.append(TextFile(relative_path, path, stat.st_size, stat.st_mtime_ns))
    files.sort(key=lambda file: file.relative_path)
    skipped.sort(key=lambda file: file.relative_path)
    return tuple(files), tuple(skipped)


def _refuse_unreadable(error: OSError) -> None:
    # os.walk would leave the folder out without a word, and two nodes would train on different text.
    raise ValueError(f"data.corpus: cannot list {error.filename}: {error.strerror}. Fix its permissions.")
