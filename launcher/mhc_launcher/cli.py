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
from mhc_launcher.commands_data import data_app
from mhc_launcher.commands_export import PASS_ON, export_command, generate_command
from mhc_launcher.commands_observe import top_command
from mhc_launcher.commands_schedule import plan_command, schedule_command

app = typer.Typer(
    help="Train Manifold-Constrained Hyper-Connection mixture-of-experts models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

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
    master_port: Annotated[
        int | None, typer.Option(help="Port on which the processes meet; by default a free one.")
    ] = None,
) -> None:
    """Train on this host. The last line of output is a JSON summary."""
    from mhc_launcher.local import train_here

    raise typer.Exit(train_here(_load(path, overrides), master_port))


app.command("schedule")(schedule_command)
app.command("plan")(plan_command)
app.command("top")(top_command)
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
