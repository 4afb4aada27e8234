"""Bytes to disk."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mhc_dist.checkpoint import disk


def test_size_and_checksum_of_what_was_written(tmp_path: Path) -> None:
    """Oracle: the file read back; pieces larger than a block and empty ones among them."""
    pieces = [b"head", bytes(disk.BLOCK_BYTES + 17), b"", memoryview(b"tail")]
    num_bytes, sha256 = disk.write_file(tmp_path / "file", pieces)
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert num_bytes == len(content)
    assert sha256 == hashlib.sha256(content).hexdigest()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the content, though the kernel takes three bytes at a time."""
    real = os.write
    monkeypatch.setattr(disk.os, "write", lambda descriptor, block: real(descriptor, block[:3]))
    disk.write_file(tmp_path / "file", [b"a rather long line"])
    assert (tmp_path / "file").read_bytes() == b"a rather long line"


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_failing_disk_is_named(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the kernel's error and the file's name; both survive the way to another rank."""

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk.os, call, fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        disk.write_file(tmp_path / "file", [b"x"])
    there: OSError = pickle.loads(pickle.dumps(caught.value))
    assert (there.errno, there.filename) == (errno.EIO, str(tmp_path / "file"))


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    """Oracle: its content afterwards."""
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        disk.write_file(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_text() == "old"
