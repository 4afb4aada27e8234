"""`mhc-dist inspect`: what is in a checkpoint, and whether it is all there. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhc_dist.checkpoint.folder import FOLDER, LATEST, find
from mhc_dist.checkpoint.manifest import (
    ITEM_BYTES,
    CheckpointError,
    Index,
    Manifest,
    Section,
    read_index,
    read_manifest,
)
from mhc_dist.checkpoint.verify import all_damages


@dataclass(frozen=True)
class SectionFacts:
    """What one section holds."""

    num_tensors: int
    num_elements: int
    num_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, verified. `manifest` and `sections` are None and empty where they cannot be read."""

    folder: Path
    manifest: Manifest | None
    sections: dict[str, SectionFacts]
    damages: list[str]
    others: dict[str, str]
    """Name and state of what else lies beside it."""

    def as_json(self) -> dict[str, Any]:
        """One object for scripts."""
        manifest = self.manifest
        facts: dict[str, Any] = {"checkpoint": str(self.folder), "damages": self.damages}
        if manifest is not None:
            facts |= {
                **manifest.progress.model_dump(),
                "topology": manifest.topology.model_dump(),
                "schedule": manifest.schedule,
                "learning_rate": manifest.learning_rate,
                "corpus": manifest.corpus,
                "config_sha256": manifest.config_sha256,
                "versions": manifest.versions,
                "saved_at": manifest.saved_at,
                "num_bytes": manifest.num_bytes,
                "files": {name: file.model_dump() for name, file in manifest.files.items()},
                "sections": {name: asdict(section) for name, section in self.sections.items()},
            }
        return facts | {"others": self.others}


def inspect(path: Path) -> Inspection:
    """Read and verify the checkpoint that `path` means (`find`). Raises CheckpointError if it means none."""
    folder = find(path)
    manifest: Manifest | None = None
    sections: dict[str, SectionFacts] = {}
    damages = all_damages(folder)
    try:
        manifest = read_manifest(folder)
        sections = _sections(read_index(folder))
    except CheckpointError as error:
        if str(error) not in damages:
            damages.append(str(error))
    return Inspection(folder, manifest, sections, damages, _others(folder))


def table(found: Inspection) -> str:
    """For people, a fact a line."""
    lines = [f"{name:<15}{value}" for name, value in _facts(found)]
    return "\n".join([str(found.folder), *(f"  {line}" for line in lines)])


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    manifest = found.manifest
    if manifest is not None:
        progress, topology = manifest.progress, manifest.topology
        last_step = manifest.config.get("train", {}).get("steps", "?")
        yield "step", f"{progress.step} of {last_step}, {progress.num_updates} updates applied"
        yield "tokens", f"{progress.num_tokens:,}; next sequence {progress.num_sequences:,} of the stream"
        yield (
            "topology",
            f"pipeline {topology.pipeline} x data {topology.data}, experts over {topology.expert};"
            f" {manifest.schedule}",
        )
        yield (
            "saved",
            f"{manifest.saved_at} by " + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
        )
        yield "config", f"sha256 {manifest.config_sha256}"
        for name, section in found.sections.items():
            counts = f"{section.num_tensors:,} tensors, {section.num_elements:,} elements"
            yield name, f"{counts}, {size(section.num_bytes)}"
        yield "size", f"{size(manifest.num_bytes)} in {len(manifest.files)} files"
        if not found.damages:
            for file, facts in manifest.files.items():
                yield "file", f"{file}  {facts.num_bytes:,} bytes  sha256 {facts.sha256}  verified"
    for sentence in found.damages:
        yield "DAMAGED", sentence
    for name, state in found.others.items():
        yield "beside it", f"{name}: {state}"


def size(num_bytes: int) -> str:
    """`3.2 MB`: powers of ten, as disks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"


def _sections(index: Index) -> dict[str, SectionFacts]:
    found = {}
    for section in Section:
        tensors = [index.tensors[section.key(name)] for name in index.names(section)]
        if tensors:
            found[section.value] = SectionFacts(
                len(tensors),
                sum(tensor.num_elements for tensor in tensors),
                sum(tensor.num_elements * ITEM_BYTES[tensor.dtype] for tensor in tensors),
            )
    return found


def _others(folder: Path) -> dict[str, str]:
    if folder.parent.name != FOLDER:
        return {}
    others = {}
    for entry in sorted(folder.parent.iterdir()):
        if entry.name == LATEST:
            others[entry.name] = f"points to {entry.readlink()}" if entry.is_symlink() else "no link"
        elif entry != folder and entry.name.startswith("step_"):
            mark = entry.suffix.removeprefix(".")
            states = {"tmp": "never committed", "": "committed, not verified"}
            others[entry.name] = states.get(mark, f"set aside as {mark.partition('-')[0]}")
    return others
