"""`metrics.jsonl`: one JSON object per line, appended as the run goes, readable at any moment.

A process killed while it writes leaves half a line; opening the log for more cuts that off, reading passes
over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from mhc_dist.observe import whole_lines

LOG_FILE = "metrics.jsonl"

Scalar = float | int | str | bool | None
Record = dict[str, Scalar]


class RunLog:
    """Appends to the log of one run. Make it with `create` or `resume`; rank 0 alone does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    @classmethod
    def create(cls, folder: Path) -> Self:
        """A new log. One that is there from an earlier run of the same name is kept under another name."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        if path.exists():
            number = 1
            while (kept := folder / f"metrics.{number}.jsonl").exists():
                number += 1
            path.rename(kept)
        return cls(path)

    @classmethod
    def resume(cls, folder: Path, last_step: int) -> Self:
        """Continue a log after `last_step`: later records, and half a line at the end, are dropped.

        A run that died after its last checkpoint repeats those steps, and they must not be there twice.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        if path.exists():
            records = [record for record in read_log(folder) if _step(record) <= last_step]
            whole_lines.replace(path, "".join(_line(record) for record in records))
        return cls(path)

    def append(self, record: Mapping[str, Scalar]) -> None:
        """Write one line and hand it to the operating system, so that it survives this process.

        Raises OSError, and leaves the log as it was, where that cannot be done.
        """
        whole_lines.append(self._file, _line(record))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(folder: Path) -> list[Record]:
    """All complete records of a run, oldest first. Raises ValueError for a missing or damaged log."""
    path = folder / LOG_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not the folder of a run that made a step.")
    lines = path.read_text(encoding="utf-8").split("\n")
    # Every complete line ends in a newline, so what follows the last one is nothing or half a record.
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}). Remove that line.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object. Remove that line.")
        records.append(record)
    return records


def _step(record: Record) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


def _line(record: Mapping[str, Scalar]) -> str:
    # JSON has no word for infinity or NaN; null keeps the file readable for every other program.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"
