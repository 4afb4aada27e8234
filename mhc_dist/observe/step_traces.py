"""Traces of chosen steps: a file per rank, written by that rank, and one of all ranks, joined by rank 0.

    RUN/trace/step_10/rank_3.json     rank 3's actions of step 10
    RUN/trace/step_10.json            everybody's, for ui.perfetto.dev or `mhc-dist plan --calibrate`

No rank asks another one for anything: files are put together after the steps are over. Times are those of the
monotonic clock, which all processes of a host share; ranks of several hosts are brought together by what each
host's wall clock says, so between hosts times are as good as these agree.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhc_dist.pipeline.perfetto import TraceEvent, read_about, read_events, recorded_events, write_events
from mhc_dist.pipeline.trace import Trace
from mhc_dist.topology import Topology

PATIENCE_SECONDS = 10.0
"""A run may end while a slower rank is still writing its last file."""


class StepTraces:
    """Writes this rank's traces of `steps` (counted from 1) below `folder`, the run's own."""

    def __init__(self, folder: Path, steps: Sequence[int], topology: Topology) -> None:
        self._folder, self._topology = folder / "trace", topology
        self._chosen = frozenset(steps)
        self._written: list[int] = []

    def write(self, step: int, trace: Trace, num_tokens: int) -> None:
        """Write the step's trace, if it is one of the chosen steps."""
        if step not in self._chosen:
            return
        topology = self._topology
        about: dict[str, Any] = {
            "step": step,
            "rank": topology.rank,
            "pipeline_rank": topology.pipeline_rank,
            "data_rank": topology.data_rank,
            "num_tokens": num_tokens,
            "seconds": trace.seconds,
            "host": socket.gethostname(),
            "wall_clock_ahead": time.time() - time.perf_counter(),
        }
        path = self._path(step, topology.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_events(recorded_events(trace, topology.rank, topology.data_rank), path, about)
        self._written.append(step)

    def merge(self, patience_seconds: float = PATIENCE_SECONDS) -> list[str]:
        """Put the files of all ranks together, step by step; returns a sentence for each step."""
        deadline = time.monotonic() + patience_seconds
        return [self._merge(step, deadline) for step in self._written]

    def _merge(self, step: int, deadline: float) -> str:
        wanted = {rank: self._path(step, rank) for rank in range(self._topology.world_size)}
        while not all(path.exists() for path in wanted.values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = {rank: path for rank, path in wanted.items() if path.exists()}
        merged = self._folder / f"step_{step}.json"
        write_events(join_hosts(list(found.values())), merged, {"step": step, "ranks": sorted(found)})
        missing = sorted(wanted.keys() - found.keys())
        if not missing:
            return f"trace of step {step} in {merged}"
        return (
            f"trace of step {step} in {merged}, without ranks {', '.join(map(str, missing))}: their files are"
            f" not in {self._folder / f'step_{step}'}. Is train.output a folder that all hosts share?"
        )

    def _path(self, step: int, rank: int) -> Path:
        return self._folder / f"step_{step}" / f"rank_{rank}.json"


def join_hosts(paths: Sequence[Path]) -> list[TraceEvent]:
    """Events of all files on the clock of the first file's host, in order of their start."""
    abouts = [read_about(path) for path in paths]
    events: list[TraceEvent] = []
    for path, about in zip(paths, abouts, strict=True):
        ahead = about["wall_clock_ahead"] - abouts[0]["wall_clock_ahead"]
        # Two readings of one host's clocks differ by noise alone.
        shift = 0.0 if about["host"] == abouts[0]["host"] else ahead
        events += [replace(e, start=e.start + shift, end=e.end + shift) for e in read_events(path)]
    return sorted(events, key=lambda event: (event.rank, event.start, event.end))
