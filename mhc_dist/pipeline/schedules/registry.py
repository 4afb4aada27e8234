"""Schedules by name. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.schedules.dualpipe import dualpipe
from mhc_dist.pipeline.schedules.dualpipev import dualpipev
from mhc_dist.pipeline.schedules.gpipe import gpipe
from mhc_dist.pipeline.schedules.interleaved import interleaved
from mhc_dist.pipeline.schedules.one_f_one_b import one_f_one_b
from mhc_dist.pipeline.schedules.zb1p import zb1p
from mhc_dist.pipeline.schedules.zbv import zbv

SCHEDULES: dict[str, Callable[[int, int], CoarseSchedule]] = {
    "1f1b": one_f_one_b,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "gpipe": gpipe,
    "interleaved": interleaved,
    "zb1p": zb1p,
    "zbv": zbv,
}

SIMULATED_ONLY = frozenset({"dualpipe"})
"""Schedules that can be printed, validated and simulated, but not run: two copies of the model need an
optimizer that adds the gradients of both, which the engine does not do."""


def make_schedule(name: str, num_ranks: int, num_microbatches: int) -> CoarseSchedule:
    """The named schedule over `num_ranks` pipeline ranks; ValueError says what is possible instead."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}. Known schedules: {', '.join(sorted(SCHEDULES))}.")
    if num_ranks < 1 or num_microbatches < 1:
        raise ValueError(
            f"num_ranks={num_ranks} and num_microbatches={num_microbatches} must both be at least 1."
        )
    return SCHEDULES[name](num_ranks, num_microbatches)
