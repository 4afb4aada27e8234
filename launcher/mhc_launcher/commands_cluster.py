"""`mhc-dist k8s render`, `mhc-dist slurm render`, `mhc-dist preflight`: runs on clusters of others."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mhc_launcher.kubernetes.render import render
from mhc_launcher.kubernetes.request import Flavor, request
from mhc_launcher.slurm_script import SlurmRequest, render_sbatch

k8s_app = typer.Typer(no_args_is_help=True, help="Run on Kubernetes.")
slurm_app = typer.Typer(no_args_is_help=True, help="Run under Slurm.")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A run's YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value.")]


@k8s_app.callback()
def _k8s() -> None:
    """Run on Kubernetes."""


@slurm_app.callback()
def _slurm() -> None:
    """Run under Slurm."""


@k8s_app.command("render")
def k8s_render(
    path: Config,
    nodes: Annotated[int, typer.Option(help="Number of pods, one a node.")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so processes, of each pod; 0: CPUs.")],
    flavor: Annotated[Flavor, typer.Option(help="Which controller starts the pods.")] = Flavor.INDEXED_JOB,
    image: Annotated[str, typer.Option(help="The image, as your cluster pulls it.")] = "mhc-dist:latest",
    namespace: Annotated[str, typer.Option(help="Namespace of everything.")] = "default",
    processes_per_node: Annotated[int | None, typer.Option(help="Without GPUs: processes a pod.")] = None,
    data_claim: Annotated[str, typer.Option(help="Volume claim mounted read-only at /data.")] = "mhc-data",
    runs_claim: Annotated[str, typer.Option(help="Volume claim for runs and checkpoints.")] = "mhc-runs",
    shared_memory: Annotated[str, typer.Option(help="Size of /dev/shm.")] = "16Gi",
    memory: Annotated[str, typer.Option(help="Memory of a pod.")] = "64Gi",
    cpus: Annotated[int, typer.Option(help="CPU cores of a pod.")] = 8,
    resources: Annotated[
        list[str] | None,
        typer.Option("--resource", metavar="NAME=COUNT", help="More devices of a pod: rdma/ib=8, say."),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Write here instead of stdout.")] = None,
) -> None:
    """Write complete manifests of a run; `kubectl apply -f -` takes them."""
    wanted = request(
        path,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        flavor=flavor,
        image=image,
        namespace=namespace,
        data_claim=data_claim,
        runs_claim=runs_claim,
        shared_memory=shared_memory,
        memory=memory,
        cpus=cpus,
        resources=resources or (),
    )
    _write(render(wanted, _command()), output)


@slurm_app.command("render")
def slurm_render(
    path: Config,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so processes, of each node; 0: CPUs.")],
    processes_per_node: Annotated[int | None, typer.Option(help="Without GPUs: processes a node.")] = None,
    time: Annotated[str, typer.Option(help="Longest time of the job, as sbatch writes it.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Partition, where there is no default.")] = None,
    cpus_per_task: Annotated[int, typer.Option(help="CPU cores of a process.")] = 8,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Write here instead of stdout.")] = None,
) -> None:
    """Write a script for sbatch."""
    wanted = SlurmRequest.make(
        path, overrides or [], nodes, gpus_per_node, processes_per_node, time, partition, cpus_per_task
    )
    _write(render_sbatch(wanted, _command()), output)


def preflight_command(context: typer.Context) -> None:
    """Look at all hosts and links before a run: under mpirun or torchrun (`--help` for options)."""
    # The measuring needs torch, which this package does not import; the process stays the same one.
    os.execv(sys.executable, [sys.executable, "-m", "mhc_dist.preflight", *context.args])


def _command() -> str:
    return shlex.join(["mhc-dist", *sys.argv[1:]])


def _write(text: str, output: Path | None) -> None:
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)
