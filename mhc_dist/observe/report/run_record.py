"""A run's folder as a report sees it: whatever is there is read, whatever is missing is missing.

Runs that are still going, that died, or that an earlier version wrote are reported as far as they go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mhc_dist.observe.rank_log import RankTimes, read_rank_logs
from mhc_dist.observe.run_log import Record, read_log


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    config: as written, not checked again: an earlier version's keys are shown, not refused.
    log: one record per step. ranks: time and memory per rank, where kept. traces: step to merged trace file.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    log: list[Record]
    ranks: list[RankTimes]
    stability: list[dict[str, Any]]
    traces: dict[int, Path]
    summary: dict[str, Any] | None
    failure: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.folder.name

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records that have a number under `key`."""
        points = [
            (step, value)
            for record in self.log
            if isinstance(step := record.get("step"), int)
            and isinstance(value := record.get(key), (int, float))
            and not isinstance(value, bool)
        ]
        return [step for step, _ in points], [float(value) for _, value in points]


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. Raises ValueError when it is not one, or holds no finished step."""
    log = read_log(folder)
    if not log:
        raise ValueError(f"{folder} holds no finished step yet: nothing to report.")
    config_path = folder / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    config = yaml.safe_load(config_text)
    return RunRecord(
        folder=folder,
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        log=log,
        ranks=read_rank_logs(folder),
        stability=_json_lines(folder / "stability"),
        traces=_traces(folder / "trace"),
        summary=_json(folder / "summary.json"),
        failure=_json(folder / "failure.json"),
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None  # a process was killed while writing it; the rest of the run still has its report
    return content if isinstance(content, dict) else None


def _json_lines(folder: Path) -> list[dict[str, Any]]:
    """Complete lines of every file of a folder, in order of file name."""
    lines: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return lines


def _traces(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("step_*.json"):
        step = path.stem[len("step_") :]
        if step.isdigit():
            found[int(step)] = path
    return dict(sorted(found.items()))
