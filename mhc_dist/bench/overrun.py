"""Whether delay mode was valid: phases that lasted longer than their nominal time. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.trace import Event

BOUND = 0.05
"""Largest share of late time at which a run still says something."""


@dataclass(frozen=True)
class Overrun:
    """Seconds that phases should have lasted, seconds that they lasted beyond, and phases late by more than a
    tenth of their time.
    """

    nominal_seconds: float = 0.0
    late_seconds: float = 0.0
    num_phases: int = 0
    num_late: int = 0

    @staticmethod
    def of(events: Iterable[Event], nominal: CostTable) -> Overrun:
        """What one rank's events show against the times they should have had."""
        should = late = 0.0
        num_phases = num_late = 0
        for event in events:
            if event.action.kind not in COMPUTE_KINDS:
                continue
            seconds = nominal.seconds(event.action)
            beyond = max(0.0, event.end - event.start - seconds)
            should, late, num_phases = should + seconds, late + beyond, num_phases + 1
            num_late += beyond > 0.1 * seconds
        return Overrun(should, late, num_phases, num_late)

    def __add__(self, other: Overrun) -> Overrun:
        return Overrun(
            self.nominal_seconds + other.nominal_seconds,
            self.late_seconds + other.late_seconds,
            self.num_phases + other.num_phases,
            self.num_late + other.num_late,
        )

    @property
    def share(self) -> float:
        return self.late_seconds / self.nominal_seconds if self.nominal_seconds else 0.0

    def figures(self) -> dict[str, float]:
        return {
            "overrun_share": self.share,
            "late_phases_share": self.num_late / self.num_phases if self.num_phases else 0.0,
        }

    def check(self, bound: float) -> None:
        """Raise ValueError when the processors did not keep up: figures would be about them."""
        if self.share > bound:
            raise ValueError(
                f"phases overran their nominal time by {self.share:.1%}, more than {bound:.1%}: processors"
                " are saturated and the figures not valid. Raise --slow-motion, lower the sizes, or use a"
                " machine that does nothing else."
            )
