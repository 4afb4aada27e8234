"""The error for programs that must not run. Standard library only."""

from __future__ import annotations

from mhc_dist.pipeline.action import Action


class InvalidProgram(ValueError):  # noqa: N818 - reads as what it says of the program
    """Names the rank, the action and the reason."""

    def __init__(self, rank: int, action: Action | None, reason: str) -> None:
        self.rank = rank
        self.action = action
        self.reason = reason
        super().__init__(f"rank {rank}, {action if action is not None else 'end of program'}: {reason}")
