"""A committed checkpoint as tensors, whole and on the CPU: for export, generation, comparison.

    checkpoint = Checkpoint.open(Path("runs/tiny"))         a run's newest, or runs/tiny/checkpoints/step_...
    checkpoint.manifest.progress.step, checkpoint.config    where it stands, the run's RunConfig
    for name in checkpoint.names():                         names in the whole model, experts one by one:
        weight = checkpoint.load_tensor(name)               layers.3.feed_forward.experts.5.down.weight

Training itself resumes through `load.py`, where every rank reads its own fragments and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from mhc_dist.checkpoint.folder import find
from mhc_dist.checkpoint.manifest import (
    CheckpointError,
    DtypeName,
    Index,
    Manifest,
    Section,
    read_index,
    read_manifest,
)
from mhc_dist.checkpoint.verify import all_damages
from mhc_dist.config import RunConfig

DTYPES: dict[DtypeName, torch.dtype] = {"F32": torch.float32, "U8": torch.uint8, "I64": torch.int64}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, verified when it was opened."""

    folder: Path
    manifest: Manifest
    index: Index

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Open a checkpoint, or the newest one of a run's folder; reads every file once to verify it.

        Raises CheckpointError that names what is missing or damaged.
        """
        folder = find(Path(path))
        if found := all_damages(folder):
            raise CheckpointError(
                f"{folder} cannot be used: {'; '.join(found)}. `mhc-dist inspect` shows the others of a run."
            )
        return Checkpoint(folder, read_manifest(folder), read_index(folder))

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the run that saved it. Raises CheckpointError where this version knows other
        keys."""
        try:
            return RunConfig.model_validate(self.manifest.config)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            version = self.manifest.versions.get("mhc-dist", "?")
            raise CheckpointError(
                f"{self.folder} was saved by mhc-dist {version}, whose configuration this version does not"
                f" take: {key}: {first['msg']}. Use the version that saved it."
            ) from None

    def names(self, section: Section = Section.WEIGHT) -> list[str]:
        """Names in the whole model of everything stored in `section`, sorted."""
        return self.index.names(section)

    def shape(self, name: str, section: Section = Section.WEIGHT) -> tuple[int, ...]:
        return self.index.tensors[section.key(name)].shape

    def load_tensor(self, name: str, section: Section = Section.WEIGHT) -> Tensor:
        """The whole tensor; fp32 for weights, moments and router biases. KeyError for an unknown name."""
        stored = self.index.tensors[section.key(name)]
        flat = torch.empty(stored.num_elements, dtype=DTYPES[stored.dtype])
        for fragment in stored.fragments:
            read_into(flat[fragment.start : fragment.stop], self.folder / fragment.file, fragment.offset)
        return flat.view(stored.shape)


def read_into(tensor: Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous CPU tensor from byte `offset` on. Raises CheckpointError where a file ends early."""
    view = tensor.numpy().data.cast("B")
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"{path} ends {len(view) - done} bytes before its last fragment does. It is truncated:"
                    " use another checkpoint."
                )
            done += count
