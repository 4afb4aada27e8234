"""Series about what goes wrong and what guards against it: checkpoints, skipped steps, spikes, restarts."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge


class NonfiniteReason(StrEnum):
    """What was not finite in a step whose update was skipped."""

    LOSS = "loss"
    GRADIENT = "gradient"


class FaultSeries:
    """Exported by the one rank that reports the run, from the start with 0."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_success = Gauge(
            "mhc_checkpoint_last_success_timestamp_seconds",
            "When a checkpoint was last committed; the start of this process before the first one",
            registry=registry,
        )
        self._save_duration = Gauge(
            "mhc_checkpoint_save_duration_seconds",
            "From the start of the last save to its commit, whether training went on meanwhile or not",
            registry=registry,
        )
        self._failures = Counter(
            "mhc_checkpoint_failures", "Saves that could not be committed", registry=registry
        )
        self._nonfinite = Counter(
            "mhc_nonfinite_steps", "Steps whose update was skipped", ["reason"], registry=registry
        )
        self._spikes = Counter(
            "mhc_loss_spikes", "Steps whose loss was far above the recent ones", registry=registry
        )
        self._restarts = Counter("mhc_restarts", "Times the launcher restarted this run", registry=registry)
        self._rollbacks = Counter(
            "mhc_rollbacks", "Returns to the last checkpoint after skipped steps", registry=registry
        )
        # The stale-checkpoint alert counts from the start of the process, not from 1970.
        self._last_success.set(clock())
        self._save_duration.set(float("nan"))
        for reason in NonfiniteReason:
            self._nonfinite.labels(reason.value)

    def checkpoint_committed(self, seconds: float) -> None:
        """A save that took `seconds` in all is safe on disk."""
        self._last_success.set(self._clock())
        self._save_duration.set(seconds)

    def checkpoint_failed(self) -> None:
        self._failures.inc()

    def nonfinite_step(self, reason: NonfiniteReason) -> None:
        self._nonfinite.labels(reason.value).inc()

    def loss_spike(self) -> None:
        self._spikes.inc()

    def restarted(self, times: int) -> None:
        """Called once by a process that the launcher started for the (times + 1)-th time."""
        self._restarts.inc(times)

    def rolled_back(self) -> None:
        self._rollbacks.inc()
