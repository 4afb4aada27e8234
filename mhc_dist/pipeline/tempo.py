"""How fast a rank computed, as it went along. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle


@dataclass(frozen=True, slots=True)
class Tempo:
    """A stretch of one rank's compute that was watched. pieces: what each phase costs (seconds, above 0), and
    how many seconds each of these took, in the order the phases ran.
    """

    pieces: tuple[tuple[float, float], ...]


class TempoCursor:
    """Goes along a tempo as a rank computes, and starts over at its end.

    What counts is how much has been computed, not which phases that was. So a program that runs the phases in
    another order takes, altogether, the time that those watched took; what was slow for a while is slow for
    as much work; and ranks that were watched at the same time are slow together, if they were.
    """

    def __init__(self, tempo: Tempo) -> None:
        self._pieces = cycle(tempo.pieces)
        self._left, self._factor = next(self._pieces)

    def seconds(self, cost: float) -> float:
        """What the next phase takes, which costs `cost`."""
        seconds = 0.0
        while cost > self._left:
            seconds += self._left * self._factor
            cost -= self._left
            self._left, self._factor = next(self._pieces)
        self._left -= cost
        return seconds + cost * self._factor
