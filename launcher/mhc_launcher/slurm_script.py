"""A script for sbatch: asks for the nodes, and passes Slurm's signals on to the run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Self

from mhc_dist.config import RunConfig, load_config

RESERVE_SECONDS = 60


@dataclass(frozen=True)
class SlurmRequest:
    """One script. Raises ValueError (from `make`) for tasks that are not the run's."""

    config: RunConfig
    path: str
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    time: str
    partition: str | None
    cpus_per_task: int

    @classmethod
    def make(
        cls,
        path: str,
        overrides: list[str],
        nodes: int,
        gpus_per_node: int,
        processes_per_node: int | None,
        time: str,
        partition: str | None,
        cpus_per_task: int,
    ) -> Self:
        config = load_config(path, overrides)
        tasks = gpus_per_node or processes_per_node or 0
        sizes = config.parallel
        if nodes * tasks != config.num_processes:
            raise ValueError(
                f"--nodes {nodes} with {tasks} processes each make {nodes * tasks}, but"
                f" parallel.pipeline={sizes.pipeline} x parallel.data={sizes.data} needs"
                f" {config.num_processes}. Change --nodes or --gpus-per-node (without GPUs:"
                " --processes-per-node), or the two sizes."
            )
        return cls(
            config, path, tuple(overrides), nodes, gpus_per_node, tasks, time, partition, cpus_per_task
        )


def render_sbatch(request: SlurmRequest, command: str) -> str:
    """The script's text."""
    seconds = int(request.config.checkpoint.stop_seconds) + RESERVE_SECONDS
    lines = [
        "#!/bin/bash",
        f"# {command}",
        f"#SBATCH --job-name={request.config.train.name}",
        f"#SBATCH --nodes={request.nodes}",
        f"#SBATCH --ntasks-per-node={request.tasks_per_node}",
        f"#SBATCH --cpus-per-task={request.cpus_per_task}",
        *([f"#SBATCH --gpus-per-node={request.gpus_per_node}"] if request.gpus_per_node else []),
        *([f"#SBATCH --partition={request.partition}"] if request.partition else []),
        f"#SBATCH --time={request.time}",
        "#SBATCH --exclusive",
        f"# {seconds} s before the end of the time the run is asked to stop: it saves a checkpoint.",
        f"#SBATCH --signal=B:TERM@{seconds}",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "",
        "set -euo pipefail",
        "# The environment must be the same on all nodes: a folder that they share, or one that each has.",
        "# source /path/to/mhc_dist/.venv/bin/activate",
        "",
        "# exec: Slurm's signal reaches mhc-dist itself. Submitted again, the run goes on where it was"
        " stopped.",
    ]
    words = ["exec", "mhc-dist", "train", request.path, "--launcher", "slurm", "--resume", "auto"]
    words += [part for value in request.overrides for part in ("--set", value)]
    return "\n".join([*lines, shlex.join(words), ""])
