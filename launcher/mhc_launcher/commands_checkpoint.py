"""`mhc-dist inspect`: hands over to what reads checkpoints without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mhc_dist.guard.exit_codes import ExitCode


def inspect_command(
    path: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder for its newest one.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what is in a checkpoint and verify every file. Exit code 1 if anything is damaged."""
    from mhc_dist.checkpoint.inspection import inspect, table

    found = inspect(path)
    typer.echo(json.dumps(found.as_json()) if as_json else table(found))
    raise typer.Exit(ExitCode.ERROR if found.damages else ExitCode.OK)
