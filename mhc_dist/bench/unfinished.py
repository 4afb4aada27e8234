"""Cases of a bench that takes long, kept as they are measured: whoever ends it early can go on later.

One line of JSON with the settings, then one per case. Cases measured with other settings, by other code or on
another machine are never mixed with these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Unfinished:
    """The file of one bench; any process may add to it, one at a time."""

    path: Path

    @classmethod
    def begin(cls, path: Path, settings: Mapping[str, Any]) -> Unfinished:
        """Without cases, whatever was there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n")
        return cls(path)

    @classmethod
    def resume(cls, path: Path, settings: Mapping[str, Any]) -> Unfinished:
        """With the cases that are there. ValueError if they were measured with other settings."""
        if not path.is_file():
            return cls.begin(path, settings)
        *lines, cut = path.read_text().split("\n")
        found: dict[str, Any] = json.loads(lines[0]) if lines else {}
        wanted: dict[str, Any] = json.loads(json.dumps(settings))
        other = [
            f"{name} {_short(found.get(name))}, now {_short(wanted.get(name))}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
        if other:
            raise ValueError(
                f"{path} holds cases of another run: {'; '.join(other)}. Leave out --resume to measure all"
                " cases again."
            )
        if cut:  # the last line, whose writer was ended: no case
            path.write_text("".join(f"{line}\n" for line in lines))
        return cls(path)

    def add(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        return [json.loads(line) for line in self.path.read_text().splitlines()[1:]]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
