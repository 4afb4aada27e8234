"""A simulation in a few figures. Standard library only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.simulate import RankTimeline

COMPUTE = (
    ActionKind.COMPUTE,
    ActionKind.GRADIENT,
    ActionKind.WEIGHT,
    ActionKind.RECOMPUTE,
)


class Timelines(Protocol):
    """A simulated step, or a part of one. makespan: its seconds, of all ranks alike."""

    @property
    def ranks(self) -> Sequence[RankTimeline]: ...

    @property
    def makespan(self) -> float: ...


@dataclass(frozen=True)
class Summary:
    """Seconds are means over ranks; ratios are of the step, or of what they are a part of.

    bubble_ratio: share of the step in which a rank waits for a peer that has not sent yet, or has ended.
    exposed_*: share of the step blocked on a transfer on the wire. *_hidden_ratio: share of the time in
    flight (or of recompute time) that was covered by compute (or by a transfer in flight).
    """

    step_seconds: float
    compute_seconds: float
    recompute_seconds: float
    bubble_ratio: float
    exposed_all_to_all_ratio: float
    exposed_p2p_ratio: float
    all_to_all_seconds: float
    all_to_all_hidden_ratio: float
    recompute_hidden_ratio: float
    peak_bytes: tuple[int, ...]


def summarize(simulation: Timelines) -> Summary:
    """Figures over all ranks of `simulation`."""
    ranks = simulation.ranks
    step = simulation.makespan
    total = step * len(ranks) or 1.0
    compute = sum(rank.busy(*COMPUTE) for rank in ranks)
    starved = sum(a.starved for rank in ranks for a in rank.actions)
    tail = sum(step - rank.seconds for rank in ranks)
    blocked = sum(rank.blocked(ActionKind.WAIT) for rank in ranks)
    flying = sum(_exchange_seconds(rank) for rank in ranks)
    recompute = sum(rank.busy(ActionKind.RECOMPUTE) for rank in ranks)
    return Summary(
        step_seconds=step,
        compute_seconds=compute / len(ranks),
        recompute_seconds=recompute / len(ranks),
        bubble_ratio=(starved + tail) / total,
        exposed_all_to_all_ratio=blocked / total,
        exposed_p2p_ratio=sum(rank.blocked(ActionKind.ARRIVE) for rank in ranks) / total,
        all_to_all_seconds=flying / len(ranks),
        all_to_all_hidden_ratio=1.0 - blocked / flying if flying else 1.0,
        recompute_hidden_ratio=sum(map(_recompute_covered, ranks)) / recompute if recompute else 1.0,
        peak_bytes=tuple(rank.peak_bytes for rank in ranks),
    )


def _exchange_seconds(rank: RankTimeline) -> float:
    return sum(f.end - f.start for f in rank.flights if f.action.kind is ActionKind.ISSUE)


def _recompute_covered(rank: RankTimeline) -> float:
    """Seconds of recomputation during which an exchange of the same rank was on the wire."""
    flights = sorted((f.start, f.end) for f in rank.flights if f.action.kind is ActionKind.ISSUE)
    merged: list[list[float]] = []
    for start, end in flights:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    starts = [start for start, _ in merged]
    covered = 0.0
    for a in rank.actions:
        if a.action.kind is ActionKind.RECOMPUTE:
            index = max(0, bisect_right(starts, a.start) - 1)
            while index < len(merged) and merged[index][0] < a.end:
                covered += max(0.0, min(a.end, merged[index][1]) - max(a.start, merged[index][0]))
                index += 1
    return covered
