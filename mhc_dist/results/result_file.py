"""A result file, typed: figures with the command, label, commit and machine they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.bench.result import SCHEMA


@dataclass(frozen=True)
class ResultFile:
    """Everything a page says about a figure besides the figure. load: one-minute average; time: ISO, UTC."""

    path: Path
    command: str
    label: str
    commit: str
    machine: str
    cores: int
    load: float
    time: str | None
    figures: Mapping[str, Any]


def read_result(path: Path, label: str | None = None) -> ResultFile:
    """One file of results/. `label` is for those that carry none: the kernels', which import nothing from
    here and keep `provenance` among their figures. ValueError for what is no result file, or of another
    version.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): write it again, or remove it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no result: it is a JSON {type(content).__name__}, not an object.")
    # The first files were written before versions were.
    version = content.get("schema", SCHEMA)
    if version != SCHEMA:
        raise ValueError(
            f"{path} is of version {version!r}, and this program reads version {SCHEMA}. Measure again with"
            f" {content.get('command', 'the command that wrote it')!r}, or use the program that wrote it."
        )
    try:
        return _of_kernels(path, content, label) if "provenance" in content else _of_bench(path, content)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: it is no result file, or one that was cut short.") from None


def _of_bench(path: Path, content: dict[str, Any]) -> ResultFile:
    conditions = content["conditions"]
    return ResultFile(
        path=path,
        command=content["command"],
        label=content["label"],
        commit=conditions["commit"],
        machine=conditions["processor"],
        cores=conditions["cores"],
        load=conditions["load_average"][0],
        time=conditions["time"],
        figures=content["figures"],
    )


def _of_kernels(path: Path, content: dict[str, Any], label: str | None) -> ResultFile:
    provenance = content["provenance"]
    if label is None:
        raise KeyError("label")
    return ResultFile(
        path=path,
        command=provenance["command"],
        label=label,
        commit=provenance["commit"],
        machine=provenance["machine"],
        cores=provenance["cores"],
        load=provenance["load_average"],
        time=provenance.get("time"),
        figures={name: value for name, value in content.items() if name != "provenance"},
    )
