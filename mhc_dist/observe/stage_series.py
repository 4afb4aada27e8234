"""Series about one pipeline stage: expert load, and how far its streams are from doubly stochastic mixing.

Layers and experts are never labels: their detail goes to the run's folder, not to Prometheus.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

DIRECTIONS = ("forward", "backward")
AXES = ("rows", "columns")


class StageSeries:
    """Exported by the first data rank of the stage."""

    def __init__(self, registry: CollectorRegistry, stage: int) -> None:
        self._stage = str(stage)
        self._amax_gain = Gauge(
            "mhc_amax_gain",
            "Largest row sum (forward) or column sum (backward) of the product of the stage's residual mixes",
            ["direction", "stage"],
            registry=registry,
        )
        self._sinkhorn_residual = Gauge(
            "mhc_sinkhorn_residual",
            "Largest distance of a row or column sum of a residual mix from 1, over the stage's layers",
            ["stage", "axis"],
            registry=registry,
        )
        self._load_ratio = Gauge(
            "mhc_moe_load_max_to_mean_ratio",
            "Tokens of the fullest expert over the mean, worst layer of the stage; 1 is balanced",
            ["stage"],
            registry=registry,
        )
        self._dropped = Counter(
            "mhc_moe_dropped_tokens",
            "Tokens that no expert saw because it was full; stays 0, exchanges have no capacity limit",
            ["stage"],
            registry=registry,
        )
        self._dropped.labels(self._stage)

    def record_stability(
        self, *, forward_gain: float, backward_gain: float, row_residual: float, column_residual: float
    ) -> None:
        """Composite gains of the stage (paper, section 5.4), worst Sinkhorn residuals of its layers."""
        for direction, gain in zip(DIRECTIONS, (forward_gain, backward_gain), strict=True):
            self._amax_gain.labels(direction, self._stage).set(gain)
        for axis, residual in zip(AXES, (row_residual, column_residual), strict=True):
            self._sinkhorn_residual.labels(self._stage, axis).set(residual)

    def record_load(self, max_to_mean_ratio: float) -> None:
        self._load_ratio.labels(self._stage).set(max_to_mean_ratio)
