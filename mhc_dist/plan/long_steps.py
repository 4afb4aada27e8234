"""Steps of very many microbatches, from a shorter step whose middle repeats. Imports no torch.

A pipeline that is full does the same over and over: two periods of its ranks later, the same passes run with
other microbatches. So a step of a thousand microbatches is a short step whose steady middle is counted more
often. Memory is that of the short step: the middle holds as much at its end as at its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.simulate import Flight, RankTimeline, SimulatedAction, Simulation
from mhc_dist.pipeline.summary import Summary, summarize

PERIODIC = frozenset({"1f1b", "dualpipe", "dualpipev", "interleaved", "zb1p", "zbv"})
"""Schedules with a steady middle. All that gpipe holds and does depends on the number of microbatches."""

FILL_PERIODS = 4
"""Periods of 2P microbatches that a short step has: to fill, to repeat, to drain, and one to spare."""

SHORTEST = 64
"""Steps of up to so many microbatches are simulated whole: they are quick."""


def short_count(schedule: str, num_ranks: int, num_microbatches: int) -> int:
    """How many microbatches stand for `num_microbatches`: as many, or fewer by whole periods."""
    period = 2 * num_ranks
    most = max(SHORTEST, FILL_PERIODS * period)
    if schedule not in PERIODIC or num_microbatches <= most + period:
        return num_microbatches
    return most + (num_microbatches - most) % period


@dataclass
class _Window:
    """The steady middle of a step on every rank, as if it were a step."""

    ranks: list[RankTimeline]
    makespan: float


def stretched(simulation: Simulation, num_ranks: int, num_short: int, num_microbatches: int) -> Summary:
    """Figures of a step of `num_microbatches`, from one of `num_short` that differs by whole periods."""
    whole = summarize(simulation)
    if num_microbatches == num_short:
        return whole
    period = 2 * num_ranks
    assert (num_microbatches - num_short) % period == 0
    repeats = (num_microbatches - num_short) / period
    first = num_short // 2 - num_ranks
    windows = [_window(rank, first, first + period) for rank in simulation.ranks]
    # In a short step the other ranks may still run ahead of the slowest one; in a long one they wait for it.
    middle = summarize(_Window([w for w, _ in windows], max(length for _, length in windows)))
    return _joined(whole, middle, repeats)


def _window(rank: RankTimeline, first: int, last: int) -> tuple[RankTimeline, float]:
    """From the moment that a rank has done with microbatch `first` to the same of `last`; and its length."""
    freed = [a for a in rank.actions if a.action.kind is ActionKind.FREE]
    chunk = freed[-1].action.chunk
    ends = {a.action.microbatch: a.end for a in freed if a.action.chunk == chunk}
    start, end = ends[first], ends[last]
    return (
        RankTimeline(
            [_moved(a, start) for a in rank.actions if start < a.end <= end],
            [_flown(f, start) for f in rank.flights if start < f.end <= end],
        ),
        end - start,
    )


def _moved(a: SimulatedAction, start: float) -> SimulatedAction:
    return SimulatedAction(a.action, max(a.start - start, 0.0), a.end - start, a.blocked, a.starved)


def _flown(f: Flight, start: float) -> Flight:
    return Flight(f.action, f.lane, f.start - start, f.end - start)


def _joined(whole: Summary, middle: Summary, repeats: float) -> Summary:
    """`whole` with its middle `repeats` times more."""
    step = whole.step_seconds + repeats * middle.step_seconds

    def added(name: str) -> float:
        return float(getattr(whole, name) + repeats * getattr(middle, name))

    def weighted(ratio: str, of: str) -> float:
        parts = [
            (getattr(whole, ratio), getattr(whole, of)),
            (getattr(middle, ratio), repeats * getattr(middle, of)),
        ]
        total = sum(weight for _, weight in parts)
        return sum(value * weight for value, weight in parts) / total if total else 1.0

    return Summary(
        step_seconds=step,
        compute_seconds=added("compute_seconds"),
        recompute_seconds=added("recompute_seconds"),
        bubble_ratio=weighted("bubble_ratio", "step_seconds"),
        exposed_all_to_all_ratio=weighted("exposed_all_to_all_ratio", "step_seconds"),
        exposed_p2p_ratio=weighted("exposed_p2p_ratio", "step_seconds"),
        all_to_all_seconds=added("all_to_all_seconds"),
        all_to_all_hidden_ratio=weighted("all_to_all_hidden_ratio", "all_to_all_seconds"),
        recompute_hidden_ratio=weighted("recompute_hidden_ratio", "recompute_seconds"),
        peak_bytes=whole.peak_bytes,
    )
