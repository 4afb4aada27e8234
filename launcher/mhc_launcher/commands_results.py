"""`mhc-dist results NAME`: hands over to the module that collects, plans or draws."""

from __future__ import annotations

import typer

from mhc_launcher.modules import run_module

results_app = typer.Typer(
    no_args_is_help=True, help="The page of results, from what benches and studies wrote."
)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@results_app.command(context_settings=PASS_ON)
def page(context: typer.Context) -> None:
    """Write RESULTS.md and its pictures from the files in results/ (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.results.command", context.args))


@results_app.command(context_settings=PASS_ON)
def plans(context: typer.Context) -> None:
    """Plan many models on many clusters: what hyper-connections cost there (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.results.plans", context.args))


@results_app.command(context_settings=PASS_ON)
def scaling(context: typer.Context) -> None:
    """Weak scaling of simulated steps to 4096 GPUs, and what planning them costs (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.results.scaling", context.args))


@results_app.command(context_settings=PASS_ON)
def keep(context: typer.Context) -> None:
    """Keep what a finished run reached, for the page (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.results.keep", context.args))


@results_app.command(context_settings=PASS_ON)
def rerun(context: typer.Context) -> None:
    """Measure everything again, or list the commands (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.results.rerun", context.args))
