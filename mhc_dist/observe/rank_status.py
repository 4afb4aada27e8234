"""What a rank answers to a person who asks how it is doing: who it is, what it does, how it waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from mhc_dist.observe.metrics import RankLabels
from mhc_dist.pipeline.trace import StepPhase

COMPUTING = (StepPhase.FORWARD, StepPhase.BACKWARD, StepPhase.WEIGHT_GRADIENT, StepPhase.RECOMPUTE)
WAITING = (StepPhase.EXPOSED_ALL_TO_ALL, StepPhase.EXPOSED_P2P, StepPhase.BUBBLE)


class _LastStep(NamedTuple):
    step: int
    seconds: float
    shares: Mapping[StepPhase, float]


class RankStatus:
    """Written by the training thread, read by the exporter's: every write replaces one reference."""

    def __init__(
        self, labels: RankLabels, current_action: Callable[[], tuple[str, float]] | None = None
    ) -> None:
        self._labels, self._current_action = labels, current_action
        self._last: _LastStep | None = None

    def step_done(self, step: int, seconds: float, phase_seconds: Mapping[StepPhase, float]) -> None:
        """Step `step` took `seconds` on this rank."""
        shares = {phase: value / seconds for phase, value in phase_seconds.items()}
        self._last = _LastStep(step, seconds, shares)

    def now(self) -> dict[str, str | int | float | None]:
        """Coordinates; the action under way and since how many seconds; of the last step the number, seconds
        and the shares of it spent computing, waiting for rows, for messages, and for a neighbour to compute.
        """
        labels, last = self._labels, self._last
        action, seconds = (None, None) if self._current_action is None else self._current_action()
        shares = {} if last is None else last.shares
        return {
            "rank": labels.global_rank,
            "node": labels.node,
            "stage": labels.pp_stage,
            "data_rank": labels.dp_rank,
            "expert_rank": labels.ep_rank,
            "action": action,
            "action_seconds": seconds,
            "step": None if last is None else last.step,
            "step_seconds": None if last is None else last.seconds,
            "computing": sum(shares.get(phase, 0.0) for phase in COMPUTING),
            **{phase.value: shares.get(phase, 0.0) for phase in WAITING},
        }
