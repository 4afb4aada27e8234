"""`mhc-dist study NAME`: hands over to the module that studies, which needs torch."""

from __future__ import annotations

import typer

from mhc_launcher.modules import run_module

study_app = typer.Typer(no_args_is_help=True, help="The paper's claims at a size a small machine can check.")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@study_app.command(context_settings=PASS_ON)
def stability(context: typer.Context) -> None:
    """Deep narrow models of several residual kinds and seeds: losses and Amax gains (`--help`)."""
    raise typer.Exit(run_module("mhc_dist.study.stability", context.args))


@study_app.command(context_settings=PASS_ON)
def sinkhorn(context: typer.Context) -> None:
    """Sinkhorn's iterations, eps and input precision against exact mixes (`--help`)."""
    raise typer.Exit(run_module("mhc_dist.study.sinkhorn", context.args))
