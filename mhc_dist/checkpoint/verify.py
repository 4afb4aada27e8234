"""Is a checkpoint what its manifest says? No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mhc_dist.checkpoint.manifest import INDEX_FILE, CheckpointError, Manifest, read_index, read_manifest

BLOCK_BYTES = 4 << 20


def sha256_of(path: Path) -> str:
    """Of a file's content, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def damages(folder: Path, manifest: Manifest, files: Iterable[str]) -> Iterator[str]:
    """One sentence for each of `files` that is missing, has another size, or another checksum."""
    for name in files:
        path, facts = folder / name, manifest.files[name]
        try:
            num_bytes = path.stat().st_size
            if num_bytes != facts.num_bytes:
                kind = "truncated" if num_bytes < facts.num_bytes else "too long"
                yield f"{path} is {kind}: {num_bytes} bytes instead of {facts.num_bytes}"
                continue
            found = sha256_of(path)
        except FileNotFoundError:
            yield f"{path} is missing"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
        else:
            if found != facts.sha256:
                yield f"{path} is damaged: SHA-256 {found} instead of {facts.sha256}"


def all_damages(folder: Path) -> list[str]:
    """Everything that is wrong with a committed checkpoint; an empty list means that it can be loaded."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    found = list(damages(folder, manifest, manifest.files))
    if found:
        return found
    if INDEX_FILE not in manifest.files:
        return [f"{folder} has no {INDEX_FILE} among its files"]
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return [str(error)]
    return [
        f"{folder / INDEX_FILE}: {key} lacks {gap}"
        for key, tensor in index.tensors.items()
        if (gap := tensor.gap()) is not None
    ]
