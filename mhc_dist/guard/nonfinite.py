"""Steps whose update was skipped: when to go back to the last checkpoint, and when to give up.

What goes in is the same on all ranks, so what comes out is, without asking each other.
"""

from __future__ import annotations


class DivergedError(RuntimeError):
    """The run produces no finite numbers any more, and going back did not help."""


class NonfiniteGuard:
    """Counts skipped steps in a row and returns to a checkpoint.

    One or two of them happen in healthy runs. Many in a row mean that the weights or the data are bad: then
    the run returns to its last checkpoint and goes on from there with the text that follows, not with the
    text it has just failed on.

    Args:
        max_in_row: this many skipped steps in a row send the run back.
        max_rollbacks: this often it may return to the same checkpoint.
    """

    def __init__(self, max_in_row: int, max_rollbacks: int) -> None:
        self._max_in_row, self._max_rollbacks = max_in_row, max_rollbacks
        self.num_in_row = 0
        self._target: int | None = None
        self._num_rollbacks = 0

    def must_roll_back(self, applied: bool) -> bool:
        """Count a step; whether it is time to return to the last checkpoint."""
        self.num_in_row = 0 if applied else self.num_in_row + 1
        return self.num_in_row >= self._max_in_row

    def rolled_back(self, checkpoint_step: int | None) -> None:
        """The run stands at a checkpoint again; None if there was none to return to.

        Raises DivergedError when it must not go on.
        """
        failed = f"{self.num_in_row} steps in a row had a loss or gradient that was not finite"
        if checkpoint_step is None:
            raise DivergedError(
                f"{failed}, and there is no checkpoint to return to. Lower optim.peak_learning_rate or raise"
                " optim.warmup_steps; checkpoint.every_steps says how often a checkpoint is made."
            )
        if checkpoint_step != self._target:
            self._target, self._num_rollbacks = checkpoint_step, 0
        self._num_rollbacks += 1
        if self._num_rollbacks > self._max_rollbacks:
            raise DivergedError(
                f"{failed}, after guard.max_rollbacks={self._max_rollbacks} returns to the checkpoint of step"
                f" {checkpoint_step}. Resume from an earlier one (--resume STEP) with a lower"
                " optim.peak_learning_rate."
            )
        self.num_in_row = 0
