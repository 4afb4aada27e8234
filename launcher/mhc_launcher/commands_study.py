"""`mhc-dist study NAME`: hands over to the module that studies, which needs torch."""

from __future__ import annotations

import os
import subprocess
import sys

import typer

study_app = typer.Typer(no_args_is_help=True, help="The paper's claims at a size a small machine can check.")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@study_app.command(context_settings=PASS_ON)
def stability(context: typer.Context) -> None:
    """Deep narrow models of several residual kinds and seeds: losses and Amax gains (`--help`)."""
    raise typer.Exit(_study("mhc_dist.study.stability", context.args))


@study_app.command(context_settings=PASS_ON)
def sinkhorn(context: typer.Context) -> None:
    """Sinkhorn's iterations, eps and input precision against exact mixes (`--help`)."""
    raise typer.Exit(_study("mhc_dist.study.sinkhorn", context.args))


def _study(module: str, arguments: list[str]) -> int:
    # One thread a process, set before torch is imported: parts run side by side.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
