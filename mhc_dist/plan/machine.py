"""What a plan is made for: a cluster, and what a trace said about it."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.plan.calibration import Calibration
from mhc_dist.plan.cluster import Cluster


@dataclass(frozen=True)
class Machine:
    """calibration: None trusts the cluster file alone."""

    cluster: Cluster
    calibration: Calibration | None = None

    @property
    def memory_budget(self) -> int:
        """Bytes a rank may use."""
        device = self.cluster.device
        return int(device.memory_bytes.value * device.usable_memory.value)
