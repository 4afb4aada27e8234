"""What a user wants rendered, and the names and labels that all manifests of a run share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mhc_dist.config import RunConfig, load_config

Manifest = dict[str, Any]

MASTER_PORT = 29500
SSH_PORT = 2222
USER = 10001
"""The image's user, by number: what runAsNonRoot can check."""
RESERVE_SECONDS = 60
"""Beyond the run's own time to stop: the grace period ends with SIGKILL."""


class Flavor(StrEnum):
    """Which controller starts the pods."""

    INDEXED_JOB = "indexed-job"  # plain Kubernetes, no controller to install
    TRAINJOB = "kubeflow-trainjob"  # Kubeflow Trainer v2
    MPIJOB = "mpijob"  # Kubeflow MPI operator


@dataclass(frozen=True)
class Request:
    """One rendering. Raises ValueError for a number of pods that the run does not have."""

    config: RunConfig
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    flavor: Flavor
    image: str
    namespace: str
    data_claim: str
    runs_claim: str
    shared_memory: str
    memory: str
    cpus: int
    devices: dict[str, int] = field(default_factory=dict)
    """Further resources of a pod by name, such as ports of InfiniBand."""

    def __post_init__(self) -> None:
        sizes, total = self.config.parallel, self.nodes * self.processes_per_node
        if self.nodes < 1 or self.processes_per_node < 1 or total != self.config.num_processes:
            raise ValueError(
                f"--nodes {self.nodes} with {self.processes_per_node} processes each make {total}, but"
                f" parallel.pipeline={sizes.pipeline} x parallel.data={sizes.data} needs"
                f" {self.config.num_processes}. Change --nodes or --gpus-per-node (without GPUs:"
                " --processes-per-node), or the two sizes."
            )

    @property
    def name(self) -> str:
        """The run's name as Kubernetes allows it: pods are called NAME-0, NAME-1, ..."""
        name = re.sub(r"[^a-z0-9-]+", "-", self.config.train.name.lower()).strip("-")[:40].strip("-")
        return name if name[:1].isalpha() else f"run-{name}".strip("-")

    @property
    def labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "mhc-dist", "app.kubernetes.io/instance": self.name}

    @property
    def metadata(self) -> Manifest:
        return {"name": self.name, "namespace": self.namespace, "labels": self.labels}

    @property
    def pod_config(self) -> RunConfig:
        """The run as pods see it: what it writes lies on the volume for runs."""
        return self.config.model_copy(
            update={"train": self.config.train.model_copy(update={"output": _path("/runs")})}
        )

    @property
    def metrics_ports(self) -> list[int]:
        first = self.config.observe.metrics_port
        return list(range(first, first + self.processes_per_node)) if first else []

    @property
    def grace_seconds(self) -> int:
        """From SIGTERM to SIGKILL: the step under way, its checkpoint, and some more."""
        return int(self.config.checkpoint.stop_seconds) + RESERVE_SECONDS


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def request(
    path: str,
    overrides: list[str],
    *,
    gpus_per_node: int,
    processes_per_node: int | None,
    resources: Sequence[str] = (),
    **others: Any,
) -> Request:
    """A request with its defaults: one process a GPU. resources: devices as NAME=COUNT."""
    if gpus_per_node == 0 and processes_per_node is None:
        raise ValueError(
            "--gpus-per-node 0 says that pods compute on CPUs. Say how many processes each runs:"
            " --processes-per-node."
        )
    if gpus_per_node and processes_per_node not in (None, gpus_per_node):
        raise ValueError(
            f"--processes-per-node {processes_per_node} with --gpus-per-node {gpus_per_node}: every process"
            " has a GPU of its own. Leave out --processes-per-node."
        )
    return Request(
        config=load_config(path, overrides),
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node or gpus_per_node,
        devices=dict(_device(text) for text in resources),
        **others,
    )


def _device(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", name) or not re.fullmatch(r"[1-9]\d*", count):
        raise ValueError(
            f"--resource {text} is not of the form DOMAIN/NAME=COUNT, such as rdma/ib=8. `kubectl describe"
            " node` lists what your nodes offer."
        )
    return name, int(count)
