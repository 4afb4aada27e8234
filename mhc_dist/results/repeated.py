"""Figures that READMEs repeat from results/: found in their text, compared, put right.

A README is written by hand, so a figure in it is found by the words around it. Prose that no longer has those
words is told, not skipped: whoever changes it changes `readmes.py` too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HOLE = "{}"
NUMBER = r"([+-]?\d(?:[\d.,]*\d)?(?:e[+-]?\d+)?)"
"""What stands in a hole: 3, +7.2, 3,199 or 5.5e-4."""


@dataclass(frozen=True)
class Repeated:
    """A piece of a README: words with a hole for each of `figures`, which are as they should read."""

    file: str
    words: str
    figures: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.words.count(HOLE) == len(self.figures), self.words

    @property
    def wanted(self) -> str:
        return self.words.format(*self.figures)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Lines may break anywhere between words."""
        parts = (r"\s+".join(map(re.escape, part.split(" "))) for part in self.words.split(HOLE))
        return re.compile(NUMBER.join(parts))


@dataclass(frozen=True)
class Stale:
    """A piece whose figures are older than results/. line: counted from 1."""

    file: str
    line: int
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.found!r} should read {self.wanted!r}"


def compare(folder: Path, pieces: Iterable[Repeated]) -> list[Stale]:
    """Every piece whose figures differ, under `folder`. ValueError for one that is not there exactly once."""
    stale = []
    for piece in pieces:
        text = (folder / piece.file).read_text()
        match = _only(text, piece)
        if match.groups() != piece.figures:
            found = " ".join(match.group().split())
            stale.append(Stale(piece.file, text.count("\n", 0, match.start()) + 1, found, piece.wanted))
    return stale


def put_right(folder: Path, pieces: Sequence[Repeated]) -> list[Stale]:
    """Writes the figures that differ, and nothing else; returns what was replaced."""
    stale = compare(folder, pieces)
    for name in dict.fromkeys(one.file for one in stale):
        text = (folder / name).read_text()
        for piece in pieces:
            if piece.file == name:
                text = _filled(text, piece)
        (folder / name).write_text(text)
    return stale


def _filled(text: str, piece: Repeated) -> str:
    match = _only(text, piece)
    for number in reversed(range(len(piece.figures))):
        start, end = match.span(number + 1)
        text = text[:start] + piece.figures[number] + text[end:]
    return text


def _only(text: str, piece: Repeated) -> re.Match[str]:
    found = list(piece.pattern.finditer(text))
    if len(found) != 1:
        raise ValueError(
            f"{piece.file} has {len(found)} pieces like {piece.words!r}, where one is expected: word it so"
            " again, or change mhc_dist/results/readmes.py with it."
        )
    return found[0]
