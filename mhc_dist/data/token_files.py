"""The format of prepared tokens: a folder with `train.bin`, `validation.bin` and `tokens.json`.

The .bin files are bare little-endian unsigned integers that every process maps into memory; `tokens.json`
says how wide they are and what they hold. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mhc_dist.data.corpus import Corpus, SkippedFile, TextFile
from mhc_dist.data.encode import Encoder, NotTextError, looks_like_text, text_pieces, token_dtype
from mhc_dist.data.split import split_files

DESCRIPTION_FILE = "tokens.json"
FORMAT = 1
MAX_NAMED_SKIPPED = 50

STORED_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "|u1": np.dtype(np.uint8),
    "<u2": np.dtype(np.uint16).newbyteorder("<"),
    "<u4": np.dtype(np.uint32).newbyteorder("<"),
}

TokenArray = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class TokenData:
    """Tokens of a corpus, mapped from disk.

    `fingerprint` covers every token and the vocabulary size: ranks compare it before the first step, since
    nodes with different text would train on a mixture nobody asked for.
    """

    train: TokenArray
    validation: TokenArray
    vocab_size: int
    fingerprint: str
    description: str
    skipped: tuple[SkippedFile, ...]
    num_skipped: int


def check_vocabulary(tokens: TokenData, model_vocab_size: int) -> None:
    """Refuse a model whose embedding has fewer rows than the corpus has ids."""
    if tokens.vocab_size > model_vocab_size:
        raise ValueError(
            f"model.vocab_size={model_vocab_size} is less than the {tokens.vocab_size} token ids of the"
            f" corpus ({tokens.description}). Set model.vocab_size={tokens.vocab_size}."
        )


def building_name(folder: Path) -> Path:
    """Where this process assembles `folder` before renaming it: beside it, and no other process's name."""
    return folder.with_name(f"{folder.name}.building-{socket.gethostname()}-{os.getpid()}")


def write_token_files(corpus: Corpus, encoder: Encoder, validation_fraction: float, folder: Path) -> None:
    """Encode a corpus into `folder`, which appears complete or not at all.

    If another process created it meanwhile, that one stays: both hold the same tokens.
    """
    building = building_name(folder)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _write_into(building, corpus, encoder, validation_fraction)
        try:
            building.rename(folder)
        except OSError:
            if not (folder / DESCRIPTION_FILE).is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_into(folder: Path, corpus: Corpus, encoder: Encoder, validation_fraction: float) -> None:
    skipped = list(corpus.skipped)
    text_files = []
    for file in corpus.files:
        if looks_like_text(file.path):
            text_files.append(file)
        else:
            skipped.append(SkippedFile(file.relative_path, "not UTF-8 text"))
    split = split_files(text_files, validation_fraction)
    dtype = token_dtype(encoder.vocab_size)
    sides = {
        "train": _write_side(folder / "train.bin", split.train, encoder, dtype, skipped),
        "validation": _write_side(folder / "validation.bin", split.validation, encoder, dtype, skipped),
    }
    for side, facts in sides.items():
        if facts["num_files"] == 0:
            raise ValueError(
                f"no file of the {side} split of {corpus.root} is UTF-8 text to its end"
                f" ({len(skipped)} files skipped). Convert the files to UTF-8."
            )
    num_files = sides["train"]["num_files"] + sides["validation"]["num_files"]
    content = {
        "format": FORMAT,
        "description": f"{corpus.name}, {num_files} files as {encoder.name}",
        "vocab_size": encoder.vocab_size,
        "dtype": dtype.newbyteorder("<").str,
        "separator": encoder.separator,
        "validation_fraction": validation_fraction,
        **sides,
        "num_skipped": len(skipped),
        "skipped": [[file.relative_path, file.reason] for file in skipped[:MAX_NAMED_SKIPPED]],
    }
    with (folder / DESCRIPTION_FILE).open("w") as output:
        json.dump(content, output, indent=1)
        output.flush()
        os.fsync(output.fileno())


def _write_side(
    path: Path,
    files: Sequence[TextFile],
    encoder: Encoder,
    dtype: np.dtype[np.unsignedinteger],
    skipped: list[SkippedFile],
) -> dict[str, Any]:
    num_files = 0
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as output:
        for file in files:
            start = output.tell()
            digest_before = digest.copy()
            try:
                _write_file(output, file, encoder, dtype, digest)
            except NotTextError as error:
                # Text at the head, something else further in: take back what was written of it.
                output.seek(start)
                output.truncate()
                digest = digest_before
                skipped.append(SkippedFile(file.relative_path, str(error)))
                continue
            num_files += 1
        num_tokens = output.tell() // dtype.itemsize
        output.flush()
        os.fsync(output.fileno())
    return {"num_tokens": num_tokens, "num_files": num_files, "digest": digest.hexdigest()}


def _write_file(
    output: BinaryIO,
    file: TextFile,
    encoder: Encoder,
    dtype: np.dtype[np.unsignedinteger],
    digest: hashlib.blake2b,
) -> None:
    def write(ids: npt.NDArray[np.integer]) -> None:
        content = ids.astype(dtype.newbyteorder("<")).tobytes()
        digest.update(content)
        output.write(content)

    for text in text_pieces(file.path):
        write(encoder.encode(text))
    write(np.array([encoder.separator]))


def read_token_files(folder: Path) -> TokenData:
    """Map a prepared folder. Raises ValueError when it is damaged or of another version."""
    remedy = "Delete the folder and prepare it again."
    try:
        content = json.loads((folder / DESCRIPTION_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / DESCRIPTION_FILE} is damaged: {error}. {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"{folder} has token format {found}, this version reads {FORMAT}. {remedy}")
    try:
        dtype = STORED_DTYPES[content["dtype"]]
        counts = {side: int(content[side]["num_tokens"]) for side in ("train", "validation")}
        digests = "".join(content[side]["digest"] for side in ("train", "validation"))
        vocab_size = int(content["vocab_size"])
        skipped = tuple(SkippedFile(path, reason) for path, reason in content["skipped"])
        num_skipped = int(content["num_skipped"])
        summary = str(content["description"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / DESCRIPTION_FILE} lacks or garbles {error}. {remedy}") from error
    arrays: dict[str, TokenArray] = {}
    for side, num_tokens in counts.items():
        path = folder / f"{side}.bin"
        num_bytes = path.stat().st_size if path.is_file() else 0
        if num_tokens == 0 or num_bytes != num_tokens * dtype.itemsize:
            raise ValueError(
                f"{path} has {num_bytes} bytes, {num_tokens} tokens of {dtype.itemsize} bytes were expected."
                f" {remedy}"
            )
        arrays[side] = np.memmap(path, dtype=dtype, mode="r")
    fingerprint = hashlib.blake2b(f"{vocab_size} {digests}".encode(), digest_size=16).hexdigest()
    description = f"{summary}: {counts['train']:,} training and {counts['validation']:,} validation tokens"
    return TokenData(
        arrays["train"], arrays["validation"], vocab_size, fingerprint, description, skipped, num_skipped
    )
