"""What a rank exports to Prometheus. Nothing here talks to other ranks: a hang must stay visible.

Numbers that are the same everywhere (loss, tokens, steps, gradient norm, learning rate) are exported by one
rank of the run only: summed over ranks they would count the same token once per pipeline rank.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

from mhc_dist.observe.fault_series import FaultSeries
from mhc_dist.observe.stage_series import StageSeries
from mhc_dist.pipeline.trace import StepPhase

STEP_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class CommOp(StrEnum):
    ALL_TO_ALL = "all_to_all"
    P2P = "p2p"
    REDUCE = "reduce"


@dataclass(frozen=True, slots=True)
class CommUse:
    """What one kind of communication did in a step on this rank; `exposed_seconds` nothing else ran."""

    seconds: float = 0.0
    exposed_seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunStep:
    """The numbers of a step that are the same on every rank."""

    step: int
    loss: float
    num_tokens: int
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class RankStep:
    """The numbers of a step that belong to one rank. Memory stays None where it is not measured."""

    seconds: float
    phase_seconds: Mapping[StepPhase, float] = field(default_factory=dict)
    comm: Mapping[CommOp, CommUse] = field(default_factory=dict)
    memory_allocated_bytes: int | None = None
    memory_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """What utilisation is computed from.

    flops_per_token: forward and backward of the whole model. peak_flops: of one device, per second, dense,
    in the run's precision; None where no cluster file says.
    """

    flops_per_token: int
    peak_flops: float | None = None


@dataclass(frozen=True, slots=True)
class RankLabels:
    """Who this rank is; on `mhc_rank_info` only, joined to other series by the query."""

    global_rank: int
    node: str
    pp_stage: int
    dp_rank: int
    ep_rank: int


class TrainMetrics:
    """All series of one rank in a registry of their own.

    Args:
        labels: who this rank is.
        reports_run: whether this is the one rank that exports the numbers of the whole run.
        work: the model's operations per token and the device's peak.
        clock: Unix time, replaced in tests.

    faults: checkpoints and guards, on the rank that reports the run; None elsewhere.
    stage: stability and expert load, on the first data rank of each pipeline stage; None elsewhere.
    """

    def __init__(
        self,
        labels: RankLabels,
        reports_run: bool,
        work: Work | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # Creation timestamps would double the number of series and nobody queries them.
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        rank_info = Info("mhc_rank", "Coordinates of this rank", registry=registry)
        rank_info.info(
            {
                "global_rank": str(labels.global_rank),
                "node": labels.node,
                "pp_stage": str(labels.pp_stage),
                "dp_rank": str(labels.dp_rank),
                "ep_rank": str(labels.ep_rank),
            }
        )
        Info("mhc_build", "Versions this rank runs", registry=registry).info(_versions())

        self._step_duration = Histogram(
            "mhc_step_duration_seconds",
            "Wall time of a step",
            buckets=STEP_SECONDS_BUCKETS,
            registry=registry,
        )
        self._phase_seconds = Counter(
            "mhc_step_phase_seconds",
            "Wall time by what the rank did, exclusive",
            ["phase"],
            registry=registry,
        )
        self._comm_seconds = Counter(
            "mhc_comm_seconds", "Time communication was under way", ["op"], registry=registry
        )
        self._comm_exposed_seconds = Counter(
            "mhc_comm_exposed_seconds",
            "Time the rank only waited for communication",
            ["op"],
            registry=registry,
        )
        self._comm_bytes = Counter("mhc_comm_bytes", "Payload sent by this rank", ["op"], registry=registry)
        # Series exist from the start with 0: a rate over a series that appears late misses its first value.
        for phase in StepPhase:
            self._phase_seconds.labels(phase.value)
        for op in CommOp:
            self._comm_seconds.labels(op.value)
            self._comm_exposed_seconds.labels(op.value)
            self._comm_bytes.labels(op.value)
        self._memory_allocated = Gauge(
            "mhc_memory_allocated_bytes", "Memory in use after the step", registry=registry
        )
        self._memory_peak = Gauge("mhc_memory_peak_bytes", "Most memory in use so far", registry=registry)
        self._last_step_timestamp = Gauge(
            "mhc_last_step_timestamp_seconds", "When this rank last finished a step", registry=registry
        )
        # The hang alert must not fire on a rank that is still building its first step.
        self._last_step_timestamp.set(clock())
        self._run = _RunSeries(registry, work) if reports_run else None
        self.faults = FaultSeries(registry, clock) if reports_run else None
        self.stage = StageSeries(registry, labels.pp_stage) if labels.dp_rank == 0 else None

    def record_rank_step(self, step: RankStep) -> None:
        """Count one step of this rank. Raises ValueError for an unknown phase or operation."""
        self._step_duration.observe(step.seconds)
        for phase, seconds in step.phase_seconds.items():
            self._phase_seconds.labels(StepPhase(phase).value).inc(seconds)
        for op, use in step.comm.items():
            name = CommOp(op).value
            self._comm_seconds.labels(name).inc(use.seconds)
            self._comm_exposed_seconds.labels(name).inc(use.exposed_seconds)
            self._comm_bytes.labels(name).inc(use.num_bytes)
        if step.memory_allocated_bytes is not None:
            self._memory_allocated.set(step.memory_allocated_bytes)
        if step.memory_peak_bytes is not None:
            self._memory_peak.set(step.memory_peak_bytes)
        self._last_step_timestamp.set(self._clock())

    def record_stop(self, phase: StepPhase, seconds: float) -> None:
        """Count time between steps, in which this rank did nothing else."""
        self._phase_seconds.labels(phase.value).inc(seconds)

    def record_run_step(self, step: RunStep) -> None:
        """Count one step of the run. Ranks that do not report the run ignore it."""
        if self._run is not None:
            self._run.record(step)

    def record_validation(self, loss: float) -> None:
        """Set the validation loss. Ranks that do not report the run ignore it."""
        if self._run is not None:
            self._run.validation_loss.set(loss)


class _RunSeries:
    def __init__(self, registry: CollectorRegistry, work: Work | None) -> None:
        self._work = work
        self.step = Gauge("mhc_step", "Number of the last finished step", registry=registry)
        self.loss = Gauge("mhc_loss", "Training loss, nats per token", registry=registry)
        self.validation_loss = Gauge(
            "mhc_validation_loss", "Validation loss, nats per token", registry=registry
        )
        self.grad_norm = Gauge("mhc_grad_norm", "Global gradient norm before clipping", registry=registry)
        self.learning_rate = Gauge("mhc_learning_rate", "Learning rate of the last step", registry=registry)
        self.tokens = Counter("mhc_tokens", "Tokens trained on, all data ranks", registry=registry)
        self.steps = Counter("mhc_steps", "Steps finished by this process", registry=registry)
        if work is not None:
            self.flops = Counter(
                "mhc_model_flops",
                "Operations of the model's forward and backward, all ranks",
                registry=registry,
            )
            if work.peak_flops is not None:
                Gauge(
                    "mhc_device_peak_flops", "Dense operations per second of one device", registry=registry
                ).set(work.peak_flops)
        # Until there is a first value a 0 would be a claim: no loss, no norm, no rate is 0.
        for gauge in (self.loss, self.validation_loss, self.grad_norm, self.learning_rate):
            gauge.set(float("nan"))

    def record(self, step: RunStep) -> None:
        self.step.set(step.step)
        self.loss.set(step.loss)
        self.grad_norm.set(step.grad_norm)
        self.learning_rate.set(step.learning_rate)
        self.tokens.inc(step.num_tokens)
        if self._work is not None:
            self.flops.inc(step.num_tokens * self._work.flops_per_token)
        self.steps.inc()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    # From package metadata: importing torch here would cost seconds in processes that only read metrics.
    for package, label in (("mhc-dist", "mhc_dist"), ("torch", "torch"), ("deepspeed", "deepspeed")):
        versions[label] = metadata.version(package)
    return versions
