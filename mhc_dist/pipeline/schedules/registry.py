"""Schedules by name. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.dualpipev import dualpipev
from mhc_dist.pipeline.schedules.one_f_one_b import one_f_one_b

SCHEDULES: dict[str, Callable[[int, int], CoarseSchedule]] = {
    "1f1b": one_f_one_b,
    "dualpipev": dualpipev,
}


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """The named schedule over `num_ranks` pipeline ranks; ValueError says what is possible instead."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}. Known schedules: {', '.join(sorted(SCHEDULES))}.")
    if num_ranks < 1 or num_microbatches < 1:
        raise ValueError(
            f"num_ranks={num_ranks} and num_microbatches={num_microbatches} must both be at least 1."
        )
    return SCHEDULES[name](num_ranks, num_microbatches)
