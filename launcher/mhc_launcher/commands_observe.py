"""`mhc-dist top`, `report` and `compare`: what runs do and did, for a person."""

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
        console = Console()
        console.print(table(run, targets, ask(targets), console.width))
    else:
        watch(run, interval, Console())


def report_command(
    run: RunFolder,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write one page about a run: loss, gains, where the time went, one step's timeline, configuration."""
    from mhc_dist.observe.report.build import write_report

    path = write_report(run)
    typer.echo(str(path))
    if open_page:
        typer.launch(str(path))


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more folders of runs.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("comparison.html"),
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Put runs side by side: curves, figures, and what their configurations differ in."""
    from rich.console import Console
    from rich.table import Table

    from mhc_dist.observe.report.build import write_comparison

    figures = write_comparison(runs, output)
    table = Table()
    for index, name in enumerate(figures.head):
        table.add_column(name, justify="right" if index else "left")
    for row in figures.rows:
        table.add_row(*row)
    Console().print(table)
    typer.echo(str(output))
    if open_page:
        typer.launch(str(output))
