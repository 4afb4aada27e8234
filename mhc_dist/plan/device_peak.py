"""The peak that utilisation is measured against."""

from __future__ import annotations

from mhc_dist.config import RunConfig
from mhc_dist.plan.cluster import load_cluster


def device_peak_flops(config: RunConfig) -> float | None:
    """Dense operations per second of a device of `schedule.cluster` in the run's precision, if it is set."""
    if config.schedule.cluster is None:
        return None
    return load_cluster(config.schedule.cluster).matmul_rate(config.train.precision)
