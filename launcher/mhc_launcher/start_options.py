"""How a user wants a run to be started, checked for sense before anything else happens."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from mhc_launcher.attempts import Restarts


class Launcher(StrEnum):
    """Who starts processes on other nodes."""

    PDSH = "pdsh"
    OPENMPI = "openmpi"
    SLURM = "slurm"
    NONE = "none"  # this process is a rank already: srun, mpirun, torchrun or a pod started it


@dataclass(frozen=True)
class StartOptions:
    """The options of `mhc-dist train` that say where processes run."""

    hostfile: Path | None = None
    launcher: Launcher | None = None
    no_ssh: bool = False
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    interface: str | None = None
    ssh_port: int | None = None
    launcher_args: str = ""
    resume: str | None = None
    max_restarts: int = 0

    @property
    def restarts(self) -> Restarts:
        return Restarts(self.resume, self.max_restarts)

    @property
    def on_this_host_only(self) -> bool:
        return self.hostfile is None and self.launcher is None and not self.no_ssh

    @property
    def split_launcher_args(self) -> list[str]:
        return shlex.split(self.launcher_args)


def checked(options: StartOptions, environ: Mapping[str, str] = os.environ) -> StartOptions:
    """The options with their defaults; a node's rank may come from a Kubernetes Indexed Job.

    Raises ValueError for options that contradict each other, or that one of the others would ignore.
    """
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise ValueError(
            f"--master-port {options.master_port} is no port. Choose one from 1024 to 65535, or leave it out."
        )
    if options.max_restarts < 0:
        raise ValueError(f"--max-restarts {options.max_restarts} is negative. Use 0 for none.")
    if options.max_restarts and options.launcher is Launcher.NONE:
        raise ValueError(
            f"--max-restarts {options.max_restarts} with --launcher none: only who started the processes can"
            " start them again. Let that repeat the command with --resume auto (srun: scontrol requeue;"
            " Kubernetes: restartPolicy)."
        )
    if options.no_ssh:
        return _without_ssh(options, environ)
    if options.node_rank is not None:
        raise ValueError(
            f"--node-rank {options.node_rank} is for nodes that are started one by one. Add --no-ssh, or"
            " leave it out."
        )
    if options.on_this_host_only:
        for name, value in (
            ("--master-addr", options.master_addr),
            ("--interface", options.interface),
            ("--ssh-port", options.ssh_port),
            ("--launcher-args", options.launcher_args or None),
        ):
            if value is not None:
                raise ValueError(
                    f"{name} {value} has no effect on a run on this host alone. Add --hostfile, or leave it"
                    " out."
                )
        return options
    match options.launcher:
        case Launcher.SLURM | Launcher.NONE if options.hostfile is not None:
            source = "Slurm's allocation" if options.launcher is Launcher.SLURM else "the environment"
            raise ValueError(
                f"--launcher {options.launcher} takes its nodes from {source}: leave out"
                f" --hostfile {options.hostfile}, or choose --launcher pdsh or openmpi."
            )
        case Launcher.PDSH | Launcher.OPENMPI if options.hostfile is None:
            raise ValueError(
                f"--launcher {options.launcher} needs to know the nodes. Add --hostfile FILE, with a line"
                " `host slots=4` for each."
            )
        case None:
            return StartOptions(**{**vars(options), "launcher": Launcher.PDSH})
    return options


def _without_ssh(options: StartOptions, environ: Mapping[str, str]) -> StartOptions:
    if options.launcher is not None:
        raise ValueError(
            f"--no-ssh starts this node's processes only, --launcher {options.launcher} starts those of all"
            " nodes. Leave out one of the two."
        )
    if options.hostfile is None or options.master_addr is None:
        missing = "--hostfile FILE" if options.hostfile is None else "--master-addr ADDRESS"
        raise ValueError(
            f"--no-ssh needs {missing}: every node has to know the others' slots, in the same order, and"
            " where rank 0 is."
        )
    if options.ssh_port is not None:
        raise ValueError(f"--ssh-port {options.ssh_port} has no effect with --no-ssh. Leave it out.")
    if options.node_rank is not None:
        return options
    index = environ.get("JOB_COMPLETION_INDEX", "")
    if not re.fullmatch(r"\d+", index):
        raise ValueError(
            "--no-ssh needs --node-rank: the number of this node's line in the hostfile, from 0. Only in a"
            " Kubernetes Indexed Job may it be left out: there JOB_COMPLETION_INDEX says it."
        )
    return StartOptions(**{**vars(options), "node_rank": int(index)})
