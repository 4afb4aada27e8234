"""Encode a folder of text once, for many runs: what `mhc-dist data prepare` does."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mhc_dist.data.corpus import PYTHON_STDLIB, SkippedFile, python_stdlib, text_folder
from mhc_dist.data.encode import ByteEncoder, Encoder, TokenizerEncoder
from mhc_dist.data.token_files import read_token_files, write_token_files


@dataclass(frozen=True)
class Prepared:
    """What was written; `skipped` names the first of `num_skipped` files."""

    output: Path
    description: str
    vocab_size: int
    num_train_tokens: int
    num_validation_tokens: int
    fingerprint: str
    num_skipped: int
    skipped: tuple[SkippedFile, ...]


def prepare_corpus(
    source: str,
    output: Path,
    tokenizer: Path | None = None,
    separator: str | None = None,
    validation_fraction: float = 0.05,
) -> Prepared:
    """Encode `source` (a folder, or python-stdlib) into the new folder `output`.

    Args:
        tokenizer: a tokenizer.json, copied along for decoding; without one, bytes are the tokens.
        separator: name of the token written after every file; only with a tokenizer.

    Raises ValueError when the source is unusable or `output` already exists.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction={validation_fraction} is not between 0 and 1.")
    if output.exists():
        raise ValueError(f"{output} already exists. Remove it or choose another --output.")
    encoder: Encoder
    if tokenizer is not None:
        encoder = TokenizerEncoder(tokenizer, separator)
    elif separator is not None:
        raise ValueError("--separator needs --tokenizer: byte tokens are always separated by byte 0.")
    else:
        encoder = ByteEncoder()
    corpus = python_stdlib() if source == PYTHON_STDLIB else text_folder(Path(source).expanduser(), output)
    try:
        write_token_files(corpus, encoder, validation_fraction, output)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, output / "tokenizer.json")
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}. Free space or choose another --output.") from error
    tokens = read_token_files(output)
    return Prepared(
        output=output,
        description=tokens.description,
        vocab_size=tokens.vocab_size,
        num_train_tokens=len(tokens.train),
        num_validation_tokens=len(tokens.validation),
        fingerprint=tokens.fingerprint,
        num_skipped=tokens.num_skipped,
        skipped=tokens.skipped,
    )
