"""A committed checkpoint written by hand, without torch: two ranks' files and one tensor cut in two."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from mhc_dist.checkpoint.disk import write_file
from mhc_dist.checkpoint.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    FileFacts,
    Fragment,
    Index,
    Manifest,
    Progress,
    Section,
    StoredTensor,
    TopologyFacts,
    index_text,
    manifest_text,
)

WEIGHT = "layers.0.attention.query.weight"
VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


def write_checkpoint(folder: Path, step: int = 20, config: dict[str, Any] | None = None) -> Manifest:
    """`VALUES` as a (2, 3) weight: four elements in rank 0's file, behind eight bytes, two in rank 1's."""
    folder.mkdir(parents=True)
    files = {}
    for name, content in (
        ("rank_00000.safetensors", bytes(8) + struct.pack("<4f", *VALUES[:4])),
        ("rank_00001.safetensors", struct.pack("<2f", *VALUES[4:])),
    ):
        num_bytes, sha256 = write_file(folder / name, [content])
        files[name] = FileFacts(num_bytes=num_bytes, sha256=sha256)
    fragments = (Fragment("rank_00000.safetensors", 0, 4, 8), Fragment("rank_00001.safetensors", 4, 6, 0))
    stored = StoredTensor(dtype="F32", shape=(2, 3), fragments=fragments)
    index = Index(tensors={Section.WEIGHT.key(WEIGHT): stored})
    num_bytes, sha256 = write_file(folder / INDEX_FILE, [index_text(index)])
    files[INDEX_FILE] = FileFacts(num_bytes=num_bytes, sha256=sha256)
    manifest = Manifest(
        progress=Progress(step=step, num_updates=step - 1, num_sequences=8 * step, num_tokens=96 * step),
        topology=TopologyFacts(pipeline=1, data=2, expert=1),
        schedule="1f1b",
        learning_rate=1e-3,
        corpus="fingerprint",
        config_sha256="0" * 64,
        config=config or {"train": {"steps": 40}},
        versions={"torch": "2.13.0"},
        saved_at="2026-01-02T03:04:05+00:00",
        files=files,
    )
    write_file(folder / MANIFEST_FILE, [manifest_text(manifest)])
    return manifest
