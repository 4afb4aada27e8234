"""What grows with the number of ranks, at 4096 and at ten times as many: derived from measured figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mhc_dist.results.shown import shown, table

NOW, THEN = 4096, 40960
WORLD_GROUPS = 2
"""gloo groups of the whole world: one for agreement, one for checkpoints (`parallel/process_groups.py`)."""

MOST_SERIES = 200
"""Of one rank's metrics (`mhc_dist/observe`)."""

PAPER_SEQUENCES = 1280
"""A step of the paper's 27B run (mHC paper, table 5)."""


def limits_table(figures: Mapping[str, Any]) -> str:
    """One row a thing that grows; `figures` are those of scaling.json."""
    starts = {start["ranks"]: start for start in figures["starts"]}
    mesh = figures["meshes"][-1]
    pair_seconds = mesh["processor_seconds"] / mesh["ranks"] ** 2
    wide = _last(figures["points"], "wider")
    rounds = wide["ring_latency_seconds"] / (wide["data"] - 1)
    wider_data = wide["data"] * THEN // NOW
    rows = [
        [
            "sequences in a step of the wider series, over the paper's",
            f"{wide['sequences_per_step'] / PAPER_SEQUENCES:.1f} times",
            f"{wide['sequences_per_step'] * THEN / NOW / PAPER_SEQUENCES:.0f} times",
            "ranks",
            "derived",
        ],
        [
            "sockets of a rank, gloo groups of the whole world",
            *(shown(WORLD_GROUPS * (ranks - 1), "int") for ranks in (NOW, THEN)),
            "ranks, all together ranks²",
            f"derived; {mesh['sockets_of_a_rank']} counted for one group of {mesh['ranks']}",
        ],
        [
            "processor seconds of a rank to open them",
            *(shown(WORLD_GROUPS * pair_seconds * ranks, ".2g") for ranks in (NOW, THEN)),
            "ranks",
            f"derived from {mesh['ranks']} ranks on this machine",
        ],
        [
            "answers that rank 0's store gives to open them",
            *(shown(WORLD_GROUPS * ranks**2, ".2g") for ranks in (NOW, THEN)),
            "ranks²",
            "derived: each rank reads each other's address",
        ],
        [
            "bytes that rank 0 serves when the roll is called",
            *(shown(starts[ranks]["roll_bytes_served"], "GB") for ranks in (NOW, THEN)),
            "ranks²",
            "derived from the length of one entry",
        ],
        [
            "seconds of a rank to list all process groups",
            *(shown(starts[ranks]["list_seconds"], ".2g") for ranks in (NOW, THEN)),
            "ranks",
            "measured",
        ],
        [
            "seconds of a rank to pass those it is not in",
            *(shown(starts[ranks]["create_seconds"], ".2g") for ranks in (NOW, THEN)),
            "ranks",
            "measured, without connections",
        ],
        [
            "latency of a ring over the data ranks, of the step",
            shown(wide["ring_latency_seconds"] / wide["step_seconds"], "%"),
            shown(rounds * (wider_data - 1) / wide["step_seconds"], "%"),
            "data ranks",
            "derived; not in the simulated step, and a tree's grows with the logarithm",
        ],
        [
            "series that Prometheus keeps, at most",
            *(shown(MOST_SERIES * ranks, "int") for ranks in (NOW, THEN)),
            "ranks",
            "derived from the limit that tests hold a rank to",
        ],
        ["files of a checkpoint", shown(NOW, "int"), shown(THEN, "int"), "ranks", "derived: one a rank"],
    ]
    return table(["what grows", f"{NOW} ranks", f"{THEN} ranks", "with", ""], rows)


def _last(points: Sequence[Mapping[str, Any]], series: str) -> Mapping[str, Any]:
    return [point for point in points if point["series"] == series][-1]
