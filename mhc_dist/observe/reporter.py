"""Everything a rank tells about its run: metrics on every rank; progress, log, picture, summary on rank 0."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import mul
from types import TracebackType
from typing import Self, TypeVar

import torch

from mhc_dist.checkpoint.outcome import SaveOutcome
from mhc_dist.config import RunConfig
from mhc_dist.guard.spikes import Spike
from mhc_dist.guard.stop import StopKind
from mhc_dist.observe.exporter import start_exporter
from mhc_dist.observe.fault_series import NonfiniteReason
from mhc_dist.observe.memory import MemoryUse, memory_use
from mhc_dist.observe.metrics import CommOp, CommUse, RankLabels, RankStep, RunStep, TrainMetrics, Work
from mhc_dist.observe.progress import TrainProgress
from mhc_dist.observe.rank_log import RankLog
from mhc_dist.observe.rank_status import RankStatus
from mhc_dist.observe.run_log import Record, RunLog, read_log
from mhc_dist.observe.stability import StageFigures
from mhc_dist.observe.stability_log import StabilityLog
from mhc_dist.observe.step_traces import StepTraces
from mhc_dist.observe.target_file import announced_target, forget_targets
from mhc_dist.optim.reduction import Reduction
from mhc_dist.pipeline.trace import StepPhase, Trace
from mhc_dist.topology import Topology

SUMMARY_FILE = "summary.json"

Written = TypeVar("Written")


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
    reduction: Reduction
    stability: StageFigures | None = None
    """Of this rank's layers, in the steps that are measured, on the first data rank of a stage."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def monitored(figures: StepFigures, validation_loss: float | None) -> dict[str, float]:
    """What goes to DeepSpeed's monitors (TensorBoard, W&B, CSV), under names of their kind."""
    values = {
        "Train/loss": figures.loss,
        "Train/grad_norm": figures.grad_norm,
        "Train/learning_rate": figures.learning_rate,
        "Train/tokens_per_second": figures.tokens_per_second,
    }
    return values if validation_loss is None else {**values, "Validation/loss": validation_loss}


class RunReporter:
    """Opens what this rank writes; a context manager that closes it again, however the run ends."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        local_rank: int,
        local_world_size: int,
        device: torch.device,
        work: Work | None = None,
        current_action: Callable[[], tuple[str, float]] | None = None,
        first_step: int = 0,
        num_restarts: int = 0,
    ) -> None:
        """
        current_action: what the rank does and for how many seconds, asked when someone wants to know.
        first_step: steps done before this process started; the run's earlier records stay up to there.
        num_restarts: how often the launcher has started this run again.
        """
        self._config = config
        self._rank, self._is_first_rank = topology.rank, topology.rank == 0
        self._stage = topology.pipeline_rank
        labels = RankLabels(
            global_rank=topology.rank,
            node=socket.gethostname(),
            pp_stage=topology.pipeline_rank,
            dp_rank=topology.data_rank,
            ep_rank=topology.expert_rank,
        )
        self._metrics = TrainMetrics(labels, reports_run=self._is_first_rank, work=work)
        self._local_rank, self._local_world_size, self._device = local_rank, local_world_size, device
        self._traces = StepTraces(config.folder, config.observe.trace_steps, topology)
        self._status = RankStatus(labels, current_action)
        self._rank_log = RankLog(config.folder, topology.rank, topology.pipeline_rank, first_step)
        self._first_step, self._num_restarts = first_step, num_restarts
        self._stability_log = self._open_stability_log(first_step)
        self._open = ExitStack()
        self._log: RunLog | None = None
        self._progress: TrainProgress | None = None
        self._started = self._accounted_until = time.perf_counter()
        self._stopped_seconds = 0.0
        self._num_nonfinite = self._num_spikes = self._num_rollbacks = 0
        self._last_step = first_step
        self._record_lost = False

    def __enter__(self) -> Self:
        self._open.callback(lambda: self._kept(self._rank_log.flush))
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
            forget_targets(self._config.train.output, self._config.train.name, self._config.num_processes)
            self._log = self._open_log(self._first_step)
            self._progress = self._open.enter_context(
                TrainProgress(self._config.train.steps, self._first_step)
            )
            if self._metrics.faults is not None:
                self._metrics.faults.restarted(self._num_restarts)
        return self

    def _open_stability_log(self, last_step: int) -> StabilityLog | None:
        if self._metrics.stage is None:
            return None
        return StabilityLog(self._config.folder, self._stage, last_step)

    def _open_log(self, last_step: int) -> RunLog:
        folder = self._config.folder
        log = RunLog.resume(folder, last_step) if last_step else RunLog.create(folder)
        self._open.callback(log.close)
        return log

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_first_rank:
            # After an error nobody else will write any more.
            merge = self._traces.merge if error is None else partial(self._traces.merge, 0.0)
            for sentence in self._kept(merge) or ():
                self.announce(sentence)
        self._open.close()

    def trace(self, figures: StepFigures) -> None:
        """Write this rank's trace of the step if it was asked for; before the ranks meet again."""
        self._kept(lambda: self._traces.write(figures.step, figures.trace, figures.num_tokens))

    def announce(self, text: str) -> None:
        """Print on rank 0."""
        if self._progress is not None:
            self._progress.message(text)

    def saved(self, outcomes: Iterable[SaveOutcome]) -> None:
        """Saves have ended, well or not."""
        faults = self._metrics.faults
        for outcome in outcomes:
            self._metrics.record_stop(StepPhase.CHECKPOINT, outcome.stopped_seconds)
            self._stopped_seconds += outcome.stopped_seconds
            if outcome.failure is not None:
                self.announce(f"WARNING: no checkpoint of step {outcome.step}: {outcome.failure}")
            if outcome.warning is not None:
                self.announce(f"WARNING: checkpoint of step {outcome.step}: {outcome.warning}")
            if faults is not None and outcome.failure is not None:
                faults.checkpoint_failed()
            elif faults is not None:
                faults.checkpoint_committed(outcome.seconds)

    def spike(self, step: int, spike: Spike) -> None:
        """The loss of a step was far above the recent ones."""
        self._num_spikes += 1
        if self._metrics.faults is not None:
            self._metrics.faults.loss_spike()
        self.announce(
            f"step {step}: loss {spike.loss:.4f} is a spike, {spike.deviations:.1f} deviations above the"
            f" median {spike.median:.4f} of the steps before it"
        )

    def rolled_back(self, step: int) -> None:
        """The run stands after `step` again; later records are dropped."""
        self._num_rollbacks += 1
        self._rank_log = RankLog(self._config.folder, self._rank, self._stage, step)
        self._stability_log = self._open_stability_log(step)
        if self._metrics.faults is not None:
            self._metrics.faults.rolled_back()
        if self._log is not None:
            self._log.close()
            self._log = self._open_log(step)

    def step(self, figures: StepFigures, validation_loss: float | None = None) -> None:
        """A training step, and the validation after it if there was one, is done: one record in the log."""
        self._last_step = figures.step
        rank_step = _rank_step(figures, memory_use(self._device))
        self._account(figures.seconds)
        self._metrics.record_rank_step(rank_step)
        self._kept(lambda: self._rank_log.step(figures.step, rank_step))
        self._status.step_done(figures.step, figures.seconds, rank_step.phase_seconds)
        if self._metrics.stage is not None and figures.load_max_to_mean_ratio is not None:
            self._metrics.stage.record_load(figures.load_max_to_mean_ratio)
        if figures.stability is not None:
            self._measured(figures.step, figures.stability)
        self._metrics.record_run_step(
            RunStep(figures.step, figures.loss, figures.num_tokens, figures.grad_norm, figures.learning_rate)
        )
        if validation_loss is not None:
            self._metrics.record_validation(validation_loss)
        if not figures.applied:
            self._skipped(figures)
        if self._log is None or self._progress is None:
            return
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
        self._kept(partial(self._log.append, record))

    def finish(self, bigram_loss: float) -> None:
        """The run is complete: picture and summary. The summary is written last; it proves success.

        Loss and speed are those of the whole run, those of earlier processes included; seconds and counts
        are this process's.
        """
        # Matplotlib takes half a second to import, and one rank draws once.
        from mhc_dist.observe.loss_plot import plot_loss

        folder = self._config.folder
        records = [record for record in read_log(folder) if "step_seconds" in record]
        if not records:
            raise ValueError(
                f"{folder} has no step of its own: the checkpoint it was resumed from is of the last one,"
                f" train.steps={self._config.train.steps}. Raise train.steps."
            )
        self._kept(lambda: plot_loss(folder, self._config.train.name, bigram_loss))
        seconds = [_number(record, "step_seconds") for record in records]
        speeds = [_number(record, "tokens_per_second") for record in records]
        validations = [record["validation_loss"] for record in records if "validation_loss" in record]
        summary = {
            "run": self._config.train.name,
            "steps": self._last_step,
            "train_loss": records[-1]["loss"],
            "validation_loss": validations[-1] if validations else None,
            "bigram_loss": bigram_loss,
            "tokens_per_second": sum(map(mul, seconds, speeds)) / sum(seconds),
            "seconds": time.perf_counter() - self._started,
            "first_step": self._first_step,
            "restarts": self._num_restarts,
            "nonfinite_steps": self._num_nonfinite,
            "loss_spikes": self._num_spikes,
            "rollbacks": self._num_rollbacks,
        }
        unfinished = folder / f"unfinished-{SUMMARY_FILE}"
        with unfinished.open("w") as file:
            json.dump(summary, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / SUMMARY_FILE)

    def _kept(self, write: Callable[[], Written]) -> Written | None:
        """Write a record. A full disk costs that one, not the run; once on every host somebody is told."""
        try:
            return write()
        except OSError as error:
            if not self._record_lost and (self._is_first_rank or self._local_rank == 0):
                told = f"WARNING: a record of the run is lost: {error}. It goes on, and writes what it can."
                if self._is_first_rank:
                    self.announce(told)
                else:
                    print(f"[rank {self._rank}] {told}", file=sys.stderr, flush=True)
            self._record_lost = True
            return None

    def _account(self, step_seconds: float) -> None:
        """Count what lay between the last step and this one, validation above all, as `other`.

        So phases add up to wall time, and not to the time of steps alone.
        """
        now = time.perf_counter()
        between = now - self._accounted_until - step_seconds - self._stopped_seconds
        self._metrics.record_stop(StepPhase.OTHER, max(0.0, between))
        self._accounted_until, self._stopped_seconds = now, 0.0

    def _measured(self, step: int, stability: StageFigures) -> None:
        assert self._metrics.stage is not None, "the first data rank of a stage measures it"
        assert self._stability_log is not None
        self._metrics.stage.record_stability(
            forward_gain=stability.gain.forward,
            backward_gain=stability.gain.backward,
            row_residual=stability.residual.rows,
            column_residual=stability.residual.columns,
        )
        self._kept(partial(self._stability_log.write, step, stability))

    def _skipped(self, figures: StepFigures) -> None:
        self._num_nonfinite += 1
        reason = NonfiniteReason.GRADIENT if figures.loss_finite else NonfiniteReason.LOSS
        if self._metrics.faults is not None:
            self._metrics.faults.nonfinite_step(reason)
        self.announce(
            f"step {figures.step}: loss {figures.loss:.4g} or gradient norm {figures.grad_norm:.4g} is not"
            " finite, weights are unchanged"
        )


def _number(record: Record, key: str) -> float:
    value = record[key]
    assert isinstance(value, (int, float)), f"{key} of step {record['step']}: {value}"
    return value


def _rank_step(figures: StepFigures, memory: MemoryUse) -> RankStep:
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
            CommOp.REDUCE: CommUse(*figures.reduction),
        },
        memory_allocated_bytes=memory.allocated_bytes,
        memory_peak_bytes=memory.peak_bytes,
    )
