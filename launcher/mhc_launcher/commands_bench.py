"""`mhc-dist bench NAME`: hands over to the module that measures, which needs torch."""

from __future__ import annotations

import typer

from mhc_launcher.modules import run_module

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure whole steps, variants in turn within one run; figures go to results/ and end as JSON.",
)

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench_app.command(context_settings=PASS_ON)
def overlap(context: typer.Context) -> None:
    """How much of all-to-all and recomputation placement hides (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.overlap", context.args))


@bench_app.command(context_settings=PASS_ON)
def overhead(context: typer.Context) -> None:
    """Steps with hyper-connections against steps with the plain residual (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.overhead", context.args))


@bench_app.command(context_settings=PASS_ON)
def memory(context: typer.Context) -> None:
    """What each recompute mode keeps for the backward, against the formula (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.memory", context.args))


@bench_app.command(context_settings=PASS_ON)
def checkpoint(context: typer.Context) -> None:
    """For how long saving stops training, at once and while it goes on (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.checkpoint", context.args))


@bench_app.command(context_settings=PASS_ON)
def simulator(context: typer.Context) -> None:
    """Predicted against measured steps, for every schedule and recompute mode (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.simulator", context.args))


@bench_app.command(context_settings=PASS_ON)
def instruments(context: typer.Context) -> None:
    """What metrics, logs and stability measurements cost (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.instruments", context.args))


@bench_app.command(context_settings=PASS_ON)
def peers(context: typer.Context) -> None:
    """The same layers under DeepSpeed's and torch's DualPipeV and ours (`--help` for options)."""
    raise typer.Exit(run_module("mhc_dist.bench.peers", context.args))
