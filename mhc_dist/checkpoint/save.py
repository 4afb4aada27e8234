"""Saving: every rank its own fragments, rank 0 the commit; at once, or while training goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mhc_dist.checkpoint.folder import UNCOMMITTED, committed, retire, step_folder, to_delete
from mhc_dist.checkpoint.manifest import CheckpointError, FileFacts, Manifest, Progress, TopologyFacts
from mhc_dist.checkpoint.outcome import SaveOutcome
from mhc_dist.checkpoint.planners import FragmentSavePlanner
from mhc_dist.checkpoint.state import Fragments, RankState
from mhc_dist.checkpoint.storage import FolderWriter
from mhc_dist.config import RunConfig

MOST_NAMED = 3
"""Ranks whose reasons are told when a save failed."""

OVERDUE_SECONDS = 1.0
"""Once a save is late, the watchdog gets this long to end the run with a dump."""


class ActionReport(Protocol):
    """`PeerWatch.report_action`: what this rank does from now on, and how long it may take."""

    def __call__(self, action: object, may_take_seconds: float | None = None) -> None: ...


@dataclass
class _UnderWay:
    step: int
    began: float
    future: Future[Any]
    stopped_seconds: float = 0.0
    ended: float | None = None


class Saver:
    """Saves this rank's part of a run's checkpoints; all ranks call the same methods in the same order.

    group: gloo, all ranks, used by nothing else: an asynchronous save talks on it from a thread of its own.
    """

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Path,
        state: RankState,
        group: dist.ProcessGroup,
        corpus: str,
        report_action: ActionReport,
    ) -> None:
        self._config, self._checkpoints, self._state = config, checkpoints, state
        self._group, self._corpus, self._report_action = group, corpus, report_action
        self._rank = dist.get_rank(group)
        self._under_way: _UnderWay | None = None
        self._retire_warning: str | None = None

    def save(self, progress: Progress, learning_rate: float) -> SaveOutcome:
        """Write and commit now. No other save may be under way (`wait`)."""
        assert self._under_way is None, f"the save of step {self._under_way.step} is not finished"
        limit = self._config.checkpoint.timeout_seconds
        self._report_action(f"writing the checkpoint of step {progress.step}", may_take_seconds=limit)
        began, failure = time.perf_counter(), None
        try:
            save(
                self._state.to_save(),
                storage_writer=self._writer(progress, learning_rate),
                planner=FragmentSavePlanner(),
                process_group=self._group,
            )
        except CheckpointException as error:
            failure = self._give_up(progress.step, error)
        seconds = time.perf_counter() - began
        return SaveOutcome(progress.step, seconds, seconds, failure, self._take_warning())

    def begin(self, progress: Progress, learning_rate: float) -> None:
        """Copy the state and return; a thread writes and commits it. No other save may be under way."""
        assert self._under_way is None, f"the save of step {self._under_way.step} is not finished"
        limit = self._config.checkpoint.timeout_seconds
        self._report_action(f"copying the state of step {progress.step}", may_take_seconds=limit)
        began = time.perf_counter()
        future = async_save(
            {},  # the stager knows where the state is
            storage_writer=self._writer(progress, learning_rate),
            planner=FragmentSavePlanner(),
            process_group=self._group,
            async_stager=_HostStager(self._state),
        )
        assert isinstance(future, Future)
        under_way = self._under_way = _UnderWay(progress.step, began, future)

        def note_end(_: Future[Any]) -> None:
            under_way.ended = time.perf_counter()

        future.add_done_callback(note_end)
        under_way.stopped_seconds = time.perf_counter() - began

    def poll(self) -> SaveOutcome | None:
        """The outcome of the save under way if it has ended. One that takes too long ends the run."""
        under_way = self._under_way
        if under_way is None:
            return None
        overdue = time.perf_counter() - under_way.began > self._config.checkpoint.timeout_seconds
        return self.wait() if overdue or under_way.future.done() else None

    def wait(self) -> SaveOutcome | None:
        """Wait for the save under way, if there is one."""
        under_way = self._under_way
        if under_way is None:
            return None
        start = time.perf_counter()
        left = self._config.checkpoint.timeout_seconds - (start - under_way.began)
        self._report_action(
            f"waiting until the checkpoint of step {under_way.step} is written",
            may_take_seconds=max(left, OVERDUE_SECONDS),
        )
        failure, error = None, under_way.future.exception()
        if isinstance(error, CheckpointException):
            failure = self._give_up(under_way.step, error)
        elif error is not None:
            # Communication failed: the ranks do not agree on anything any more.
            raise error
        self._under_way = None
        waited = time.perf_counter() - start
        ended = under_way.ended if under_way.ended is not None else time.perf_counter()
        return SaveOutcome(
            under_way.step,
            ended - under_way.began,
            under_way.stopped_seconds + waited,
            failure,
            self._take_warning(),
        )

    def _writer(self, progress: Progress, learning_rate: float) -> FolderWriter:
        config = self._config

        def describe(files: dict[str, FileFacts]) -> Manifest:
            resolved = config.model_dump(mode="json")
            return Manifest(
                progress=progress,
                topology=TopologyFacts(**config.parallel.model_dump()),
                schedule=config.schedule.name,
                learning_rate=learning_rate,
                corpus=self._corpus,
                config_sha256=config_sha256(resolved),
                config=resolved,
                versions={name: metadata.version(name) for name in ("mhc-dist", "torch", "deepspeed")},
                saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
                files=files,
            )

        return FolderWriter(
            step_folder(self._checkpoints, progress.step), self._rank, describe, self._retire_old
        )

    def _retire_old(self) -> None:
        """Retention, on rank 0 after a commit. What cannot be deleted is told, but the commit stands."""
        found = committed(self._checkpoints)
        rules = self._config.checkpoint
        for step in to_delete(list(found), rules.keep_last, rules.keep_every):
            try:
                retire(found[step])
            except OSError as error:
                self._retire_warning = f"cannot delete {found[step]}: {error}"

    def _take_warning(self) -> str | None:
        warning, self._retire_warning = self._retire_warning, None
        return warning

    def _give_up(self, step: int, error: CheckpointException) -> str:
        """What kept a checkpoint from being committed; raises what is no fault of the disk."""
        failures = sorted(error.failures.items())
        if not all(isinstance(cause, (OSError, CheckpointError)) for _, (cause, _) in failures):
            # torch's own is no Exception, and nobody would catch it.
            raise RuntimeError(str(error)) from error
        reasons = [f"rank {rank}: {cause}" for rank, (cause, _) in failures[:MOST_NAMED]]
        if len(failures) > MOST_NAMED:
            # A disk is full for all: hundreds of ranks would say so in one line.
            reasons.append(f"and {len(failures) - MOST_NAMED} more ranks")
        if self._rank == 0:
            folder = step_folder(self._checkpoints, step)
            # The space it took may be what the next attempt lacks.
            shutil.rmtree(folder.with_name(folder.name + UNCOMMITTED), ignore_errors=True)
        return "; ".join(reasons)


class _HostStager(AsyncStager):
    """Copies to host memory before `async_save` returns: then training may go on."""

    _synchronize_after_execute = False

    def __init__(self, state: RankState) -> None:
        self._state = state

    def stage(self, state_dict: dict[str, Any]) -> Fragments:
        return self._state.staged()

    def synchronize_staging(self) -> None:
        """`stage` returns when the copy is complete."""

    def close(self) -> None:
        """The copy's memory is kept for the next save."""


def config_sha256(resolved: dict[str, Any]) -> str:
    """Of a configuration as JSON, with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(resolved, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
