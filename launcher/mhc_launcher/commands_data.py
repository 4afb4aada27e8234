"""`mhc-dist data ...`: prepare token files from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Prepare what a run trains on.", no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Prepare what a run trains on."""


@data_app.command()
def prepare(
    folder: Annotated[str, typer.Argument(help="Folder of UTF-8 text files, or python-stdlib.")],
    output: Annotated[Path, typer.Option(help="New folder for the token files; give it as data.corpus.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json; without one, bytes are the tokens.")
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Name of the token after every file; by default the tokenizer's end of text."),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the files kept for validation.")
    ] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Encode a folder of text into token files that a run maps into memory."""
    # Imported here: the other commands need neither numpy nor tokenizers to start.
    from mhc_dist.data.prepare import prepare_corpus

    prepared = prepare_corpus(folder, output, tokenizer, separator, validation_fraction)
    typer.echo(f"{prepared.description}, vocabulary {prepared.vocab_size}")
    if prepared.num_skipped:
        typer.echo(f"skipped {prepared.num_skipped} files:")
        for file in prepared.skipped:
            typer.echo(f"  {file.relative_path}: {file.reason}")
        if prepared.num_skipped > len(prepared.skipped):
            typer.echo(f"  and {prepared.num_skipped - len(prepared.skipped)} more")
    typer.echo(f"written to {output}: set data.corpus={output} and model.vocab_size={prepared.vocab_size}")
    if as_json:
        content = {
            "output": str(prepared.output),
            "vocab_size": prepared.vocab_size,
            "num_train_tokens": prepared.num_train_tokens,
            "num_validation_tokens": prepared.num_validation_tokens,
            "num_skipped": prepared.num_skipped,
            "fingerprint": prepared.fingerprint,
        }
        typer.echo(json.dumps(content))
