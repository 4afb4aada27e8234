"""The `mhc-dist` command. Each subcommand is a few lines: the work is done by what it calls.

What a user wrote wrongly arrives here as ValueError and leaves as one message on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mhc_dist.config import RunConfig, dump_config, load_config
from mhc_dist.guard.exit_codes import ExitCode
from mhc_launcher.commands_bench import bench_app
from mhc_launcher.commands_checkpoint import inspect_command
from mhc_launcher.commands_cluster import k8s_app, preflight_command, slurm_app
from mhc_launcher.commands_data import data_app
from mhc_launcher.commands_export import PASS_ON, export_command, generate_command
from mhc_launcher.commands_observe import compare_command, report_command, top_command
from mhc_launcher.commands_results import results_app
from mhc_launcher.commands_schedule import plan_command, schedule_command
from mhc_launcher.commands_study import study_app
from mhc_launcher.run_folder import finished
from mhc_launcher.start_options import Launcher, StartOptions, checked

app = typer.Typer(
    help="Train Manifold-Constrained Hyper-Connection mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(k8s_app, name="k8s")
app.add_typer(slurm_app, name="slurm")
app.add_typer(study_app, name="study")
app.add_typer(results_app, name="results")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A run's YAML file; examples are in configs/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. train.steps=20. May be repeated."),
]


def _load(path: Path, overrides: list[str] | None) -> RunConfig:
    return load_config(path, overrides or ())


@app.command()
def config(path: ConfigPath, overrides: Overrides = None) -> None:
    """Check a run and print it with every value written out."""
    typer.echo(dump_config(_load(path, overrides)), nl=False)


@app.command()
def params(
    path: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Count the model's parameters by component, without building it."""
    from mhc_dist.model.count import count_parameters
    from mhc_launcher.parameter_table import parameter_table

    count = count_parameters(_load(path, overrides))
    typer.echo(parameter_table(count))
    if as_json:
        typer.echo(json.dumps({"total": count.total, "active": count.active, "vocab": count.vocab}))


@app.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Nodes of the run, one `host slots=4` a line; started over ssh.")
    ] = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(help="Who starts processes; none: this process is a rank already (srun, mpirun)."),
    ] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start this node's processes only; run the same on every node.")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(help="With --no-ssh: this node's line in the hostfile, from 0.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first node; by default its name in the hostfile.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option(help="Port on which the processes meet; by default a free one.")
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(help="Network interface between nodes; by default the way to the first."),
    ] = None,
    ssh_port: Annotated[int | None, typer.Option(help="Port of ssh on all nodes.")] = None,
    launcher_args: Annotated[
        str, typer.Option(help="Further arguments of pdsh, mpirun or srun, in one string.")
    ] = "",
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|STEP|PATH", help="Continue from the last checkpoint, a step's, or any."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Start again from the last checkpoint after a crash, at most so often.")
    ] = 0,
) -> None:
    """Train on this host, or on the nodes of --hostfile. The last line of output is a JSON summary."""
    options = checked(
        StartOptions(
            hostfile,
            launcher,
            no_ssh,
            node_rank,
            master_addr,
            master_port,
            interface,
            ssh_port,
            launcher_args,
            resume,
            max_restarts,
        )
    )
    config = _load(path, overrides)
    if resume == "auto" and (summary := finished(config)):
        typer.echo(f"mhc-dist: run {config.train.name} has made all its {summary['steps']} steps.", err=True)
        typer.echo(json.dumps(summary))
        return
    if options.on_this_host_only:
        from mhc_launcher.local import train_here

        raise typer.Exit(train_here(config, options.master_port, restarts=options.restarts))
    from mhc_launcher.nodes import train_on_nodes

    raise typer.Exit(train_on_nodes(config, options))


app.command("inspect")(inspect_command)
app.command("schedule")(schedule_command)
app.command("plan")(plan_command)
app.command("preflight", context_settings=PASS_ON)(preflight_command)
app.command("top")(top_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("export", context_settings=PASS_ON)(export_command)
app.command("generate", context_settings=PASS_ON)(generate_command)


def main() -> None:
    """Entry point of the console command."""
    try:
        app()
    except ValueError as error:
        if os.environ.get("MHC_DIST_TRACEBACK"):
            raise
        print(f"mhc-dist: {error}", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
