"""`mhc-dist top`: what a run does, for a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/tiny.")]


def top_command(
    run: RunFolder,
    interval: Annotated[float, typer.Option(help="Seconds between updates.", min=0.2)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Once, as one JSON object: rank to status, null without an answer.")
    ] = False,
) -> None:
    """Show all ranks of a running run: what each is doing, since when, and what it waited for."""
    from rich.console import Console

    from mhc_dist.observe.top import ask, find_targets, table, watch

    if as_json:
        targets = find_targets(run)
        typer.echo(json.dumps({t.rank: status for t, status in zip(targets, ask(targets), strict=True)}))
    elif once:
        targets = find_targets(run)
        Console().print(table(run, targets, ask(targets)))
    else:
        watch(run, interval, Console())
