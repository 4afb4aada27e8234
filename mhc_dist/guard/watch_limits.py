"""How long a rank may take, be silent or be late before the run ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """How long what may last, in seconds."""

    action_seconds: float = 60.0
    """Longest time one reported action may take."""
    silence_seconds: float = 30.0
    """Longest silence of a rank on another machine, or of the store itself."""
    join_seconds: float = 300.0
    """Longest time until all ranks have joined."""
    heartbeat_seconds: float = 0.5
    stop_seconds: float = 20.0
    """Time to end in order after a request to stop. DeepSpeed's launcher kills after 30."""
