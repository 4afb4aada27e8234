"""Keeps pictures in step with the result files they are drawn from: each carries a fingerprint of both."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from mhc_dist.results.collection import Collection
from mhc_dist.results.source import Picture

FINGERPRINT = "Figures"
"""Name of the PNG's text chunk."""

DOTS_PER_INCH = 100


def fingerprint(collection: Collection, picture: Picture) -> str | None:
    """Hash of the figures that `picture` shows and of the code that draws; None if nothing was measured."""
    if picture.results:
        files = [collection.get(name) for name in picture.results]
        if any(file is None for file in files):
            return None
        shown = [file.figures for file in files if file is not None]
    else:
        shown = [file.figures for _, file in sorted(collection.cells.items())]
        if not shown:
            return None
    code = Path(__file__).with_name("drawings.py").read_text()
    text = json.dumps([picture.draw, shown, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_current(collection: Collection, picture: Picture) -> bool:
    """Whether the file is what would be drawn now (or, of a picture drawn elsewhere, whether it is there)."""
    path = collection.folder / picture.file
    if picture.draw is None:
        return path.is_file()
    wanted = fingerprint(collection, picture)
    return wanted is not None and path.is_file() and read_text_chunk(path, FINGERPRINT) == wanted


def draw_all(collection: Collection, pictures: list[Picture]) -> list[Path]:
    """Draws what is not current; the paths of what was drawn. Matplotlib is loaded only for that."""
    drawn = []
    for picture in pictures:
        if picture.draw is None or is_current(collection, picture):
            continue
        mark = fingerprint(collection, picture)
        if mark is None:
            continue
        from mhc_dist.results.drawings import DRAWINGS

        path = collection.folder / picture.file
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = DRAWINGS[picture.draw](collection)
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={FINGERPRINT: mark, "Software": None})
        drawn.append(path)
    return drawn


def read_text_chunk(path: Path, name: str) -> str | None:
    """A tEXt chunk of a PNG file, or None (PNG specification, 11.3.4.3)."""
    content = path.read_bytes()
    position = 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        data = content[position + 8 : position + 8 + length]
        if kind == b"tEXt" and data.partition(b"\0")[0] == name.encode():
            return data.partition(b"\0")[2].decode("latin-1")
        position += 12 + length
    return None
