"""Which rank am I? Read from what started the process. Imports no torch.

Four kinds of start are understood, in this order, because the inner one wins when they are nested (a
torchrun inside an srun, an mpirun inside a Slurm job):

1. torchrun, the deepspeed launcher, or variables set by hand: RANK, WORLD_SIZE, LOCAL_RANK, ...
2. MPI: OMPI_COMM_WORLD_* (Open MPI) or PMI_* (MPICH, Intel MPI)
3. Slurm job steps (srun): SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, ...
4. Kubernetes Indexed Jobs with one process a pod: JOB_COMPLETION_INDEX

Nothing of the kind means a world of one process.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DEFAULT_PORT = 29500
LOCALHOST = "127.0.0.1"

# Slurm numbers the batch script, the extern step and the like from here upwards: they are not srun tasks.
FIRST_SPECIAL_SLURM_STEP = 0xFFFFFFF0


class Source(StrEnum):
    """What started this process."""

    TORCHRUN = "torchrun"  # or deepspeed, or by hand: they set the same variables
    MPI = "mpi"
    SLURM = "slurm"
    KUBERNETES = "kubernetes"
    SINGLE = "single"


@dataclass(frozen=True)
class RankEnvironment:
    """A process's place among the processes of a run, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: Source
    node: str
    """Tells this node from the others of the run; equal on its processes."""


def read_rank_environment(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Read the place of this process from `environ` (by default its own environment).

    Raises ValueError, naming the variables and the remedy, when they are incomplete or contradict each other.
    """
    variables = os.environ if environ is None else environ
    if "RANK" in variables:
        place = _torchrun(variables)
        _refuse_contradiction(variables, place)
    elif _is_mpi_process(variables):
        place = _mpi(variables)
    elif _is_slurm_task(variables):
        place = _slurm(variables)
    elif "JOB_COMPLETION_INDEX" in variables:
        place = _kubernetes(variables)
    else:
        place = RankEnvironment(0, 1, 0, 1, LOCALHOST, DEFAULT_PORT, Source.SINGLE, this_node())
    _check(place)
    return place


def _torchrun(variables: Mapping[str, str]) -> RankEnvironment:
    started_by = "RANK is set, as by torchrun or deepspeed"
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in variables else "LOCAL_SIZE"  # deepspeed's name
    return RankEnvironment(
        rank=_integer(variables, "RANK", started_by),
        world_size=_integer(variables, "WORLD_SIZE", started_by),
        local_rank=_integer(variables, "LOCAL_RANK", started_by),
        local_world_size=_integer(variables, local_size, started_by, hint="LOCAL_WORLD_SIZE"),
        master_addr=_text(variables, "MASTER_ADDR", started_by),
        master_port=_integer(variables, "MASTER_PORT", started_by),
        source=Source.TORCHRUN,
        node=_node_number(variables, "GROUP_RANK", "CROSS_RANK"),
    )


def _is_mpi_process(variables: Mapping[str, str]) -> bool:
    """True under mpirun. `srun --mpi=pmi2` sets PMI_RANK as well, but not what mpirun adds to it."""
    by_mpirun = "MPI_LOCALRANKID" in variables or not _is_slurm_task(variables)
    return "OMPI_COMM_WORLD_RANK" in variables or ("PMI_RANK" in variables and by_mpirun)


def _mpi(variables: Mapping[str, str]) -> RankEnvironment:
    if "OMPI_COMM_WORLD_RANK" in variables:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        local_names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    else:
        names, local_names = ("PMI_RANK", "PMI_SIZE"), ("MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    started_by = f"{names[0]} is set, as by mpirun"
    world_size = _integer(variables, names[1], started_by)
    local_world_size = _integer(variables, local_names[1], started_by)
    master_addr = variables.get("MASTER_ADDR")
    if master_addr is None:
        if local_world_size != world_size:
            raise ValueError(
                f"{started_by}, with {local_world_size} of {world_size} processes on this node, but"
                " MASTER_ADDR is not: mpirun does not forward it. Give the first node's address, for example"
                " `mpirun -x MASTER_ADDR=node0 -x MASTER_PORT=29500 ...`."
            )
        master_addr = LOCALHOST
    return RankEnvironment(
        rank=_integer(variables, names[0], started_by),
        world_size=world_size,
        local_rank=_integer(variables, local_names[0], started_by),
        local_world_size=local_world_size,
        master_addr=master_addr,
        master_port=_port(variables, DEFAULT_PORT),
        source=Source.MPI,
        node=this_node(),
    )


def _is_slurm_task(variables: Mapping[str, str]) -> bool:
    """True inside `srun`; the script of `sbatch` and the shell of `salloc` also carry SLURM_* variables."""
    step = variables.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in variables and step.isdigit() and int(step) < FIRST_SPECIAL_SLURM_STEP


def _slurm(variables: Mapping[str, str]) -> RankEnvironment:
    started_by = "SLURM_PROCID is set, as by srun"
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    node = _integer(variables, "SLURM_NODEID", started_by)
    tasks = expand_tasks_per_node(_text(variables, "SLURM_STEP_TASKS_PER_NODE", started_by))
    if node >= len(tasks):
        raise ValueError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={variables['SLURM_STEP_TASKS_PER_NODE']}"
            f" names {len(tasks)} nodes. Start the processes with one srun over all nodes."
        )
    nodes = variables.get("SLURM_STEP_NODELIST") or _text(variables, "SLURM_JOB_NODELIST", started_by)
    # Jobs on shared nodes must not meet on one port; the job's number tells them apart.
    job = _integer(variables, "SLURM_JOB_ID", started_by)
    return RankEnvironment(
        rank=_integer(variables, "SLURM_PROCID", started_by),
        world_size=_integer(variables, size, started_by),
        local_rank=_integer(variables, "SLURM_LOCALID", started_by),
        local_world_size=tasks[node],
        master_addr=variables.get("MASTER_ADDR") or first_host(nodes),
        master_port=_port(variables, 20000 + job % 10000),
        source=Source.SLURM,
        node=f"node {node}",
    )


def _kubernetes(variables: Mapping[str, str]) -> RankEnvironment:
    started_by = "JOB_COMPLETION_INDEX is set, as in an Indexed Job with one process a pod"
    return RankEnvironment(
        rank=_integer(variables, "JOB_COMPLETION_INDEX", started_by),
        world_size=_integer(variables, "WORLD_SIZE", started_by, hint="WORLD_SIZE to the job's completions"),
        local_rank=0,
        local_world_size=1,
        master_addr=_text(variables, "MASTER_ADDR", started_by, hint="MASTER_ADDR to JOB-0.SERVICE"),
        master_port=_port(variables, DEFAULT_PORT),
        source=Source.KUBERNETES,
        node=_node_number(variables, "JOB_COMPLETION_INDEX"),
    )


def this_node() -> str:
    """Host name and boot: two hosts may have the same name, and containers of one host share its boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def _node_number(variables: Mapping[str, str], *names: str) -> str:
    """The node's number as the launcher gives it (torchrun GROUP_RANK, deepspeed CROSS_RANK)."""
    return next((f"node {variables[name]}" for name in names if name in variables), this_node())


def expand_tasks_per_node(text: str) -> list[int]:
    """Slurm's run-length form: `2(x3),1` is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(
                f"Slurm task counts {text!r} are not of the form 2(x3),1. Unset or correct them."
            )
        tasks.extend([int(match[1])] * int(match[2] or 1))
    return tasks


def first_host(nodes: str) -> str:
    """First name in a Slurm node list: `gpu[07-09,12],cpu1` gives gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes.strip())
    if match is None:
        raise ValueError(f"Slurm node list {nodes!r} names no host. Set MASTER_ADDR to the first node.")
    return match[1] + (match[2] or "") + (match[3] or "")


def _port(variables: Mapping[str, str], default: int) -> int:
    return _integer(variables, "MASTER_PORT", "MASTER_PORT is set") if "MASTER_PORT" in variables else default


def _text(variables: Mapping[str, str], name: str, started_by: str, hint: str | None = None) -> str:
    value = variables.get(name, "").strip()
    if not value:
        raise ValueError(f"{started_by}, but {name} is not. Set {hint or name}, or unset the former.")
    return value


def _integer(variables: Mapping[str, str], name: str, started_by: str, hint: str | None = None) -> int:
    text = _text(variables, name, started_by, hint)
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name}={text!r} is not a whole number of 0 or more. Correct or unset it.")
    return int(text)


def _refuse_contradiction(variables: Mapping[str, str], place: RankEnvironment) -> None:
    """RANK left over in a shell would give every MPI process the same rank: a hang without a word."""
    for name, mine in (("OMPI_COMM_WORLD_RANK", place.rank), ("OMPI_COMM_WORLD_SIZE", place.world_size)):
        if name in variables and variables[name] != str(mine):
            raise ValueError(
                f"{name}={variables[name]}, but RANK={place.rank} and WORLD_SIZE={place.world_size}: two"
                " launchers disagree. Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE before mpirun."
            )


def _check(place: RankEnvironment) -> None:
    for kind, rank, size in (
        ("rank", place.rank, place.world_size),
        ("local rank", place.local_rank, place.local_world_size),
    ):
        if rank >= size:
            raise ValueError(
                f"{kind} {rank} is not below its number of processes {size} (read from {place.source.value}"
                " variables). Start the processes with one launcher and one set of variables."
            )
    if place.local_world_size > place.world_size:
        raise ValueError(
            f"{place.local_world_size} processes on this node, but {place.world_size} in all (read from"
            f" {place.source.value} variables). Correct the number of processes."
        )
    if not 0 < place.master_port < 65536:
        raise ValueError(f"port {place.master_port} is outside 1..65535. Correct MASTER_PORT.")
