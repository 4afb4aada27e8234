"""`mhc-dist export` and `mhc-dist generate`: hand over to the modules that do it, which need torch."""

from __future__ import annotations

import subprocess
import sys

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def export_command(context: typer.Context) -> None:
    """Write a trained model as Hugging Face folder or torch file (`--help` for options)."""
    raise typer.Exit(_run("mhc_dist.export.command", context.args))


def generate_command(context: typer.Context) -> None:
    """Let a trained model continue a text (`--help` for options)."""
    raise typer.Exit(_run("mhc_dist.generate", context.args))


def _run(module: str, arguments: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
