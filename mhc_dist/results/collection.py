"""All result files of a folder by the names that `page.yaml` gives them, and figures by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

from mhc_dist.results.result_file import ResultFile, read_result
from mhc_dist.results.shown import shown
from mhc_dist.results.source import Known

PLACEHOLDER = re.compile(r"\{(\w+):([\w. -]+)\|([^}]+)\}")
"""`{result:path.to.figure|form}` in prose."""

LINE = 110
"""Width to which paragraphs with figures are wrapped again."""


class NotMeasuredError(Exception):
    """A figure was asked for whose file is not there; its text tells the command that measures it."""


class Collection:
    """Result files of `folder`. A missing one is None until a figure of it is asked for."""

    def __init__(self, folder: Path, known: Mapping[str, Known]) -> None:
        self.folder = folder
        self.known = known
        self._read: dict[str, ResultFile | None] = {}

    def get(self, name: str) -> ResultFile | None:
        """The file, or None if it is not there."""
        if name not in self._read:
            known = self.known[name]
            path = self.folder / known.file
            self._read[name] = read_result(path, known.label) if path.is_file() else None
        return self._read[name]

    def need(self, name: str) -> ResultFile:
        """The file, or NotMeasuredError."""
        found = self.get(name)
        if found is None:
            raise NotMeasuredError(self.missing(name))
        return found

    def missing(self, name: str) -> str:
        return f"not measured yet: run `{self.known[name].line}`"

    def figure(self, name: str, path: str) -> Any:
        """One figure by its dotted path. ValueError if the file has none of that name."""
        found = self.need(name)
        value: Any = found.figures
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(
                    f"{found.path} has no figure {path!r} ({key!r} is missing): it was written by another"
                    f" version of its command. Measure again: {self.known[name].line}"
                )
            value = value[key]
        return value

    def filled(self, text: str) -> str:
        """Prose with its figures; a paragraph whose figures are not there says how to get them."""
        return "\n\n".join(self._paragraph(part) for part in text.strip().split("\n\n")) if text else ""

    def _paragraph(self, text: str) -> str:
        try:
            filled = PLACEHOLDER.sub(lambda match: shown(self.figure(match[1], match[2]), match[3]), text)
        except NotMeasuredError as error:
            return f"*{str(error)[0].upper()}{str(error)[1:]}.*"
        return text if filled == text else fill(filled, LINE, break_long_words=False, break_on_hyphens=False)

    @cached_property
    def cells(self) -> dict[tuple[str, str, int], ResultFile]:
        """The planned table: (model, cluster, devices) to what was planned."""
        files = [read_result(path) for path in sorted((self.folder / "plans").glob("*.json"))]
        return {(f.figures["model"], f.figures["cluster"], f.figures["devices"]): f for f in files}
