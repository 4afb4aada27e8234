"""One node about itself, before a run starts there. Run over ssh on every host of a hostfile:

    python -m mhc_launcher.probe '{"master_addr": ..., "several_hosts": ..., ...}'

Prints one JSON object. Nothing is started and nothing stays.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mhc_launcher.code_hash import code_hash
from mhc_launcher.devices import visible_gpus
from mhc_launcher.interfaces import GLOO, network_settings
from mhc_launcher.ports import free_port, is_free


@dataclass(frozen=True)
class Question:
    """What the launching host wants to know."""

    master_addr: str
    several_hosts: bool
    interface: str | None
    master_port: int | None
    """Of the first host alone: whether it is free there; None for any free one."""
    metrics_ports: tuple[int, ...]
    witness: str
    """A file that the launching host has just written into the folder of runs."""


@dataclass(frozen=True)
class NodeReport:
    """A node's answers. `network_problem` is the sentence for the user, or None."""

    host: str
    python: str
    code: str
    num_cpus: int
    num_gpus: int
    free_port: int
    master_port_is_free: bool
    taken_metrics_ports: tuple[int, ...]
    network: dict[str, str]
    network_problem: str | None
    sees_runs: bool


def look(question: Question) -> NodeReport:
    """What this host has."""
    environ = {GLOO: question.interface} if question.interface else dict(os.environ)
    network: dict[str, str] = {}
    problem: str | None = None
    try:
        network = network_settings(environ, question.master_addr, question.several_hosts)
    except ValueError as error:
        problem = str(error)
    return NodeReport(
        host=socket.gethostname(),
        python=platform.python_version(),
        code=code_hash(),
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=len(visible_gpus()),
        free_port=free_port(),
        master_port_is_free=question.master_port is None or is_free(question.master_port),
        taken_metrics_ports=tuple(port for port in question.metrics_ports if not is_free(port)),
        network=network,
        network_problem=problem,
        sees_runs=Path(question.witness).exists(),
    )


def main(arguments: Sequence[str]) -> int:
    fields = json.loads(arguments[0])
    fields["metrics_ports"] = tuple(fields["metrics_ports"])
    print(json.dumps(asdict(look(Question(**fields)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
