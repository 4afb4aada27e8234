"""Open the tokens a run trains on, encoding them into a cache the first time.

Any number of processes may do this at once: one encodes under a file lock, the others wait and map the
result. The kernel drops the lock of a process that dies, so nobody waits for a dead one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhc_dist.config_sections import DataConfig
from mhc_dist.data.batches import check_num_tokens
from mhc_dist.data.corpus import PYTHON_STDLIB, Corpus, python_stdlib, text_folder
from mhc_dist.data.encode import ByteEncoder, Encoder
from mhc_dist.data.token_files import (
    DESCRIPTION_FILE,
    FORMAT,
    TokenData,
    read_token_files,
    write_token_files,
)


def default_cache_folder() -> Path:
    """Where token caches go unless told otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc_dist"


def open_tokens(config: DataConfig, cache_folder: Path) -> TokenData:
    """The tokens of `data.corpus`: the standard library, a folder of text files, or a prepared folder.

    A prepared folder brings its own split and vocabulary; the other two are bytes, split by
    `data.validation_fraction` and cached in `cache_folder`.

    Raises ValueError when the corpus is missing, empty, damaged or too small for `data.sequence_length`.
    """
    folder = Path(config.corpus).expanduser()
    if config.corpus == PYTHON_STDLIB:
        tokens = _cached(python_stdlib(), ByteEncoder(), config.validation_fraction, cache_folder)
    elif (folder / DESCRIPTION_FILE).is_file():
        tokens = read_token_files(folder)
    else:
        corpus = text_folder(folder, excluded=cache_folder)
        tokens = _cached(corpus, ByteEncoder(), config.validation_fraction, cache_folder)
    check_num_tokens("training", len(tokens.train), config.sequence_length)
    check_num_tokens("validation", len(tokens.validation), config.sequence_length)
    return tokens


def _cached(corpus: Corpus, encoder: Encoder, validation_fraction: float, cache_folder: Path) -> TokenData:
    key = _cache_key(corpus, encoder, validation_fraction)
    folder = cache_folder / f"tokens-{key}"
    if not (folder / DESCRIPTION_FILE).is_file():
        num_bytes = sum(file.num_bytes for file in corpus.files)
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            with _locked(cache_folder / f"tokens-{key}.lock"):
                if not (folder / DESCRIPTION_FILE).is_file():
                    _remove_leftovers(folder)
                    write_token_files(corpus, encoder, validation_fraction, folder)
        except OSError as error:
            raise ValueError(
                f"cannot write the token cache in {cache_folder} (about {num_bytes} bytes): {error}."
                " Free space there or point XDG_CACHE_HOME to a folder that can be written."
            ) from error
    return read_token_files(folder)


def _cache_key(corpus: Corpus, encoder: Encoder, validation_fraction: float) -> str:
    """Changes whenever a file appears, goes, or is edited, and with every setting that shapes the tokens."""
    files = [[file.relative_path, file.num_bytes, file.modified_ns] for file in corpus.files]
    content = json.dumps([FORMAT, corpus.name, encoder.name, validation_fraction, files])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(folder: Path) -> None:
    """What a killed process of this host left half built. Called with the lock held, so none is alive."""
    for leftover in folder.parent.glob(f"{folder.name}.building-{socket.gethostname()}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
