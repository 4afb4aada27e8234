"""`ranks/rank_R.jsonl`: how each rank spent its time, one line for every ten steps, for the run report.

Prometheus keeps this as long as its retention says; the run's folder keeps it with the run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_dist.observe import whole_lines
from mhc_dist.observe.metrics import CommOp, RankStep
from mhc_dist.pipeline.trace import StepPhase

STEPS_PER_LINE = 10
RANKS_FOLDER = "ranks"


class RankLog:
    """Adds up steps of one rank and writes a line when there are ten, and at the end.

    A run that resumes repeats steps after its checkpoint; `first_step` cuts what was written beyond it.
    """

    def __init__(self, run: Path, rank: int, stage: int, first_step: int = 0) -> None:
        folder = run / RANKS_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rank_{rank}.jsonl"
        self._stage = stage
        kept = [line for line in _lines(self._path) if line["step"] <= first_step]
        whole_lines.replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._sum = _Sum()

    def step(self, step: int, figures: RankStep) -> None:
        """Step `step` (counted from 1) is done."""
        self._sum.add(step, figures)
        if self._sum.num_steps % STEPS_PER_LINE == 0:
            self.flush()

    def flush(self) -> None:
        """Write what has added up, if anything. Raises OSError, and goes on adding, where it cannot."""
        if self._sum.num_steps:
            line = {"stage": self._stage, **self._sum.line()}
            whole_lines.append_to(self._path, json.dumps(line) + "\n")
        self._sum = _Sum()


@dataclass
class _Sum:
    """Some steps of a rank, added up; memory as after the last of them."""

    num_steps: int = 0
    last_step: int = 0
    seconds: float = 0.0
    phase_seconds: dict[StepPhase, float] = field(default_factory=lambda: defaultdict(float))
    sent_bytes: dict[CommOp, int] = field(default_factory=lambda: defaultdict(int))
    memory_allocated_bytes: int | None = None
    memory_peak_bytes: int | None = None

    def add(self, step: int, figures: RankStep) -> None:
        self.num_steps += 1
        self.last_step = step
        self.seconds += figures.seconds
        for phase, seconds in figures.phase_seconds.items():
            self.phase_seconds[phase] += seconds
        for op, use in figures.comm.items():
            self.sent_bytes[op] += use.num_bytes
        self.memory_allocated_bytes = figures.memory_allocated_bytes
        self.memory_peak_bytes = figures.memory_peak_bytes

    def line(self) -> dict[str, Any]:
        return {
            "step": self.last_step,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "phase_seconds": {phase.value: value for phase, value in self.phase_seconds.items()},
            "sent_bytes": {op.value: value for op, value in self.sent_bytes.items()},
            "memory_allocated_bytes": self.memory_allocated_bytes,
            "memory_peak_bytes": self.memory_peak_bytes,
        }


@dataclass(frozen=True)
class RankTimes:
    """One rank's lines, oldest first, each a sum over `num_steps` steps that ends with `step`."""

    rank: int
    stage: int
    lines: list[dict[str, Any]]


def read_rank_logs(run: Path) -> list[RankTimes]:
    """The logs of all ranks that left one, in order of rank; a damaged last line is left out."""
    logs = []
    for path in (run / RANKS_FOLDER).glob("rank_*.jsonl"):
        lines = _lines(path)
        if lines:
            logs.append(RankTimes(int(path.stem[len("rank_") :]), lines[-1]["stage"], lines))
    return sorted(logs, key=lambda log: log.rank)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a log. A process that was killed leaves half a line, which is dropped."""
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in complete]
