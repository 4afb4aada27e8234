"""How many ranks a bench runs and how they compute: what the benches of whole steps share as options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mhc_dist.bench.overrun import BOUND

REAL_SIZES = ("schedule.num_microbatches=16",)
DELAY_SIZES = (
    "model.num_layers=8",
    "model.hidden_size=128",
    "model.expert_dim=128",
    "model.num_active_experts=4",
    "data.sequence_length=128",
    "schedule.num_microbatches=16",
)
"""Small enough that the ranks' real compute fits into nominal time. As many microbatches as a step on a
cluster has: with few, what fill and drain leave exposed outweighs everything else."""

SLOW_MOTION_PER_RANK, SLOW_MOTION_TO_SPARE = 1.5, 1.5
"""Nominal over measured time: for every rank that a core carries, and beyond that. Ranks that take turns on a
core find its caches cold and compute a third longer than alone; the rest is for starting at the same moment
(README, delay mode, has the measurement)."""


def slow_motion_for(num_ranks: int) -> float:
    """Nominal over measured time at which ranks are in time, whatever they start at once."""
    return SLOW_MOTION_PER_RANK * num_ranks / (os.cpu_count() or 1) + SLOW_MOTION_TO_SPARE


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Options of benches that run in real compute or in delay mode."""
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=2, help="processes (2)")
    add_delay_options(parser)
    parser.add_argument("--ratio", type=float, default=0.6, help="all-to-all time over compute time (0.6)")
    parser.add_argument(
        "--routing",
        choices=("even", "untrained"),
        default="even",
        help="rows per expert: all alike, or as random weights send them (even)",
    )


def add_delay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--slow-motion",
        type=float,
        help="delay mode: nominal over measured compute time"
        f" ({SLOW_MOTION_PER_RANK:g} times the ranks of a core, and {SLOW_MOTION_TO_SPARE:g})",
    )
    parser.add_argument(
        "--max-overrun",
        type=float,
        default=BOUND,
        help="delay mode: share of late time above which the run is refused (%(default)s)",
    )


def rank_settings(options: argparse.Namespace) -> Sequence[str]:
    """Configuration for `--ranks`."""
    if options.ranks == 2:
        return REAL_SIZES
    return (*DELAY_SIZES, f"parallel.pipeline={options.ranks // 2}")


def slow_motion_of(options: argparse.Namespace) -> float | None:
    """None for real compute. ValueError for nominal times shorter than the measured ones."""
    if options.ranks == 2:
        if options.slow_motion is not None:
            raise ValueError(
                f"--slow-motion {options.slow_motion:g} with --ranks 2, which compute in real time. Leave it"
                " out, or pass --ranks 4 or 8."
            )
        return None
    return checked_slow_motion(options.slow_motion, options.ranks)


def checked_slow_motion(asked: float | None, num_ranks: int) -> float:
    """What was asked for, else the default. ValueError below 1."""
    if asked is None:
        return slow_motion_for(num_ranks)
    if not asked >= 1:
        raise ValueError(
            f"slow_motion={asked:g} must be at least 1: phases cannot last less than their compute. The"
            f" default for {num_ranks} ranks here is {slow_motion_for(num_ranks):g}."
        )
    return asked


def label_of(options: argparse.Namespace, link: str = "emulated link") -> str:
    if options.ranks == 2:
        return f"{link}; compute measured, two ranks on two cores"
    return f"{link}; delay mode: single-process times of compute, in slow motion"
