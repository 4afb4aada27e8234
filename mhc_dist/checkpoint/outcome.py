"""How a save ended. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SaveOutcome:
    """The same on all ranks but for the seconds.

    `seconds` passed from its beginning to the commit; for `stopped_seconds` training stood still.
    `failure` says why there is no checkpoint, or is None. `warning`: what went wrong after the commit.
    """

    step: int
    seconds: float
    stopped_seconds: float
    failure: str | None = None
    warning: str | None = None
