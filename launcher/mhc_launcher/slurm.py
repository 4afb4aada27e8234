"""Inside a Slurm allocation: which nodes we have, and what srun has to be told."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from mhc_launcher.bootstrap import expand_tasks_per_node
from mhc_launcher.hostfile import Host

FIRST_PORT = 20000
NUM_PORTS = 10000


def allocated_hosts(environ: Mapping[str, str]) -> list[Host]:
    """Hosts and tasks of the allocation. Raises ValueError outside of one, and for uneven tasks."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError(
            "--launcher slurm works inside an allocation, and SLURM_JOB_NODELIST is not set. Submit a script"
            " (`mhc-dist slurm render CONFIG --nodes N --gpus-per-node G > run.sbatch; sbatch run.sbatch`),"
            " or ask for an allocation first (salloc)."
        )
    names = _expand(nodes)
    tasks = expand_tasks_per_node(environ.get("SLURM_TASKS_PER_NODE", "1"))
    if len(tasks) != len(names):
        raise ValueError(
            f"SLURM_JOB_NODELIST={nodes} has {len(names)} nodes, but SLURM_TASKS_PER_NODE="
            f"{environ.get('SLURM_TASKS_PER_NODE')} speaks of {len(tasks)}. Ask for the allocation with"
            " --nodes and --ntasks-per-node."
        )
    if len(set(tasks)) > 1:
        raise ValueError(
            f"the allocation has {', '.join(map(str, tasks))} tasks on its nodes; srun is told one number for"
            " all. Ask for the same number on each: --ntasks-per-node."
        )
    return [Host(name, count) for name, count in zip(names, tasks, strict=True)]


def _expand(nodes: str) -> list[str]:
    """Slurm's own command knows every form of a node list."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False, timeout=30
        )
    except FileNotFoundError:
        raise ValueError(
            "scontrol is not in PATH: --launcher slurm works where Slurm's commands are installed."
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"scontrol did not expand {nodes!r} within 30 s. Is Slurm's controller up?"
        ) from None
    if done.returncode:
        raise ValueError(f"scontrol cannot expand {nodes!r}: {done.stderr.strip()}.")
    return done.stdout.split()


def master_port(environ: Mapping[str, str]) -> int:
    """Jobs on shared nodes must not meet on one port; the job's number tells them apart."""
    return FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % NUM_PORTS


def computes_on_gpus(environ: Mapping[str, str], backend: str, hosts: Sequence[Host]) -> bool:
    """Whether the allocation has GPUs for this run.

    Raises ValueError when the run wants them and there are none, or fewer than tasks on a node.
    """
    count = environ.get("SLURM_GPUS_ON_NODE", "0")
    num_gpus = int(count) if count.isdigit() else 0
    if backend == "gloo" or (backend == "auto" and num_gpus == 0):
        return False
    if num_gpus < hosts[0].slots:
        raise ValueError(
            f"train.backend={backend}: {num_gpus} GPUs on a node for {hosts[0].slots} tasks, and every"
            " process needs one of its own. Ask for them (--gpus-per-node), or set train.backend=gloo."
        )
    return True


def arguments(hosts: Sequence[Host], chosen: Sequence[str]) -> list[str]:
    """Arguments of srun: ours first, so that the user's `--launcher-args` have the last word."""
    return [
        *("--nodes", str(len(hosts))),
        *("--ntasks-per-node", str(hosts[0].slots)),
        # Ranks end by themselves and say why; one that does not is not waited for without an end.
        "--kill-on-bad-exit=0",
        "--wait=90",
        # Each rank picks its GPU by its number on the node, so all of a node's must be visible to it.
        "--gpu-bind=none",
        *chosen,
    ]
