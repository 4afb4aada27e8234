"""Everything a rank tells about its run: metrics on every rank; progress, log, picture, summary on rank 0."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import psutil

from mhc_dist.config import RunConfig
from mhc_dist.guard.stop import StopKind
from mhc_dist.observe.exporter import start_exporter
from mhc_dist.observe.loss_plot import plot_loss
from mhc_dist.observe.metrics import CommOp, CommUse, RankLabels, RankStep, RunStep, TrainMetrics, Work
from mhc_dist.observe.progress import TrainProgress
from mhc_dist.observe.rank_log import RankLog
from mhc_dist.observe.rank_status import RankStatus
from mhc_dist.observe.run_log import RunLog
from mhc_dist.observe.step_traces import StepTraces
from mhc_dist.observe.target_file import announced_target
from mhc_dist.pipeline.trace import StepPhase, Trace
from mhc_dist.topology import Topology

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class StepFigures:
    """One training step as one rank saw it; loss, norm, rate, applied, stop are the same on all ranks."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    loss_finite: bool
    stop: StopKind | None
    num_tokens: int
    seconds: float
    data_seconds: float
    load_max_to_mean_ratio: float | None
    trace: Trace

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class RunReporter:
    """Opens what this rank writes; a context manager that closes it again, however the run ends."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        local_rank: int,
        local_world_size: int,
        work: Work | None = None,
        current_action: Callable[[], tuple[str, float]] | None = None,
    ) -> None:
        """`current_action`: what the rank does and for how many seconds, asked when someone wants to know."""
        self._config = config
        self._rank, self._is_first_rank = topology.rank, topology.rank == 0
        labels = RankLabels(
            global_rank=topology.rank,
            node=socket.gethostname(),
            pp_stage=topology.pipeline_rank,
            dp_rank=topology.data_rank,
            ep_rank=topology.expert_rank,
        )
        self._metrics = TrainMetrics(labels, reports_run=self._is_first_rank, work=work)
        self._local_rank, self._local_world_size = local_rank, local_world_size
        self._traces = StepTraces(config.folder, config.observe.trace_steps, topology)
        self._status = RankStatus(labels, current_action)
        self._rank_log = RankLog(config.folder, topology.rank, topology.pipeline_rank)
        self._open = ExitStack()
        self._log: RunLog | None = None
        self._progress: TrainProgress | None = None
        self._started = time.perf_counter()
        self._step_seconds = 0.0
        self._num_tokens = 0
        self._last: StepFigures | None = None
        self._validation_loss: float | None = None

    def __enter__(self) -> Self:
        self._open.callback(self._rank_log.flush)
        if port := self._config.observe.metrics_port:
            exporter = start_exporter(
                self._metrics.registry,
                port + self._local_rank,
                stride=self._local_world_size,
                status=self._status.now,
            )
            self._open.callback(exporter.close)
            self._open.enter_context(
                announced_target(
                    self._config.train.output,
                    self._config.train.name,
                    self._rank,
                    socket.gethostname(),
                    exporter.port,
                )
            )
        if self._is_first_rank:
            self._log = self._open.enter_context(RunLog.create(self._config.folder))
            self._progress = self._open.enter_context(TrainProgress(self._config.train.steps))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_first_rank:
            # After an error nobody else will write any more.
            for sentence in self._traces.merge() if error is None else self._traces.merge(0.0):
                self.announce(sentence)
        self._open.close()

    def trace(self, figures: StepFigures) -> None:
        """Write this rank's trace of the step if it was asked for; before the ranks meet again."""
        self._traces.write(figures.step, figures.trace, figures.num_tokens)

    def announce(self, text: str) -> None:
        """Print on rank 0."""
        if self._progress is not None:
            self._progress.message(text)

    def step(self, figures: StepFigures, validation_loss: float | None = None) -> None:
        """A training step, and the validation after it if there was one, is done: one record in the log."""
        rank_step = _rank_step(figures)
        self._metrics.record_rank_step(rank_step)
        self._rank_log.step(figures.step, rank_step)
        self._status.step_done(figures.step, figures.seconds, rank_step.phase_seconds)
        if self._metrics.stage is not None and figures.load_max_to_mean_ratio is not None:
            self._metrics.stage.record_load(figures.load_max_to_mean_ratio)
        self._metrics.record_run_step(
            RunStep(figures.step, figures.loss, figures.num_tokens, figures.grad_norm, figures.learning_rate)
        )
        self._last = figures
        self._step_seconds += figures.seconds
        self._num_tokens += figures.num_tokens
        if validation_loss is not None:
            self._metrics.record_validation(validation_loss)
            self._validation_loss = validation_loss
        if self._log is None or self._progress is None:
            return
        if not figures.applied:
            self.announce(
                f"step {figures.step}: gradient norm {figures.grad_norm} is not finite, weights are unchanged"
            )
        record = {
            "step": figures.step,
            "loss": figures.loss,
            "grad_norm": figures.grad_norm,
            "learning_rate": figures.learning_rate,
            "tokens_per_second": figures.tokens_per_second,
            "step_seconds": figures.seconds,
            "expert_load_max_to_mean": figures.load_max_to_mean_ratio,
        }
        self._progress.update(figures.step, figures.loss, figures.tokens_per_second)
        if validation_loss is not None:
            record["validation_loss"] = validation_loss
            self._progress.validation(figures.step, validation_loss)
        self._log.append(record)

    def finish(self, bigram_loss: float) -> None:
        """The run is complete: picture and summary. The summary is written last; it proves success."""
        assert self._last is not None, "a run has at least one step"
        folder = self._config.folder
        plot_loss(folder, self._config.train.name, bigram_loss)
        summary = {
            "run": self._config.train.name,
            "steps": self._last.step,
            "train_loss": self._last.loss,
            "validation_loss": self._validation_loss,
            "bigram_loss": bigram_loss,
            "tokens_per_second": self._num_tokens / self._step_seconds,
            "seconds": time.perf_counter() - self._started,
        }
        unfinished = folder / f"unfinished-{SUMMARY_FILE}"
        with unfinished.open("w") as file:
            json.dump(summary, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / SUMMARY_FILE)


def _rank_step(figures: StepFigures) -> RankStep:
    """Seconds by phase, adding up to the step: what the executor did not time is `other`."""
    seconds: dict[StepPhase, float] = defaultdict(float)
    for phase, value in figures.trace.phase_seconds().items():
        seconds[phase] += value
    seconds[StepPhase.DATA] += figures.data_seconds
    seconds[StepPhase.OTHER] += figures.seconds - sum(seconds.values())
    sent = figures.trace.payload_bytes()
    exposed_all_to_all = seconds[StepPhase.EXPOSED_ALL_TO_ALL]
    exposed_p2p = seconds[StepPhase.EXPOSED_P2P]
    return RankStep(
        seconds=figures.seconds,
        phase_seconds=seconds,
        comm={
            CommOp.ALL_TO_ALL: CommUse(
                figures.trace.exchange_seconds(), exposed_all_to_all, sent["all_to_all"]
            ),
            CommOp.P2P: CommUse(exposed_p2p, exposed_p2p, sent["p2p"]),
        },
        memory_allocated_bytes=psutil.Process().memory_info().rss,
        memory_peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    """Largest resident size of this process; getrusage counts kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
