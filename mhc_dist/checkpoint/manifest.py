"""What a committed checkpoint says about itself: `manifest.json` and `index.json`. No torch here.

A checkpoint is a folder:

    manifest.json             step, data position, config, topology; size and SHA-256 of every other file
    index.json                for every tensor of the model: dtype, shape, and where its fragments lie
    rank_00000.safetensors    the fragments that rank 0 wrote; one such file per rank

A tensor is stored under a section and its name in the whole model, `weight/layers.3.attention.query.weight`.
Its fragments are ranges of the tensor read as one long vector, so that it does not matter into how many
partitions, and where, the optimizer of the run that saved it had cut it.

Nothing in these files is code, and reading them runs none.
"""

from __future__ import annotations

import hashlib
import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

FORMAT = "mhc_dist checkpoint, version 1"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
CHECKSUM_KEY = "manifest_sha256"

DtypeName = Literal["F32", "U8", "I64"]
"""As safetensors calls them: fp32 weights and moments, bytes of random generators."""

ITEM_BYTES: dict[DtypeName, int] = {"F32": 4, "U8": 1, "I64": 8}


Document = TypeVar("Document", bound="_Stored")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another model. The message names it, and what to do."""


class Section(StrEnum):
    """What a stored tensor is; the first part of its key."""

    WEIGHT = "weight"
    """fp32 master weight."""
    FIRST_MOMENT = "first_moment"
    SECOND_MOMENT = "second_moment"
    BUFFER = "buffer"
    """What the model keeps without a gradient: the biases of routers."""
    RANDOM = "random"
    """States of random generators, one per rank of the run that saved."""

    def key(self, name: str) -> str:
        return f"{self.value}/{name}"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileFacts(_Stored):
    num_bytes: NonNegativeInt
    sha256: str


class TopologyFacts(_Stored):
    """Of the run that saved. A run that resumes may have another one."""

    pipeline: PositiveInt
    data: PositiveInt
    expert: PositiveInt


class Progress(_Stored):
    """How far the run was. The next step is number `step`, counted from 0, and takes the sequences of the
    training stream from number `num_sequences` on."""

    step: NonNegativeInt
    num_updates: NonNegativeInt
    """Steps whose update was applied; Adam's bias correction counts these."""
    num_sequences: NonNegativeInt
    num_tokens: NonNegativeInt
    """Tokens of all steps so far, those of skipped ones included."""


class Manifest(_Stored):
    format: Literal["mhc_dist checkpoint, version 1"] = "mhc_dist checkpoint, version 1"
    progress: Progress
    topology: TopologyFacts
    schedule: str
    learning_rate: float
    """Of the last step; what follows is computed from `config.optim` and the step."""
    corpus: str
    """Fingerprint of the tokens: a data position means nothing in another text."""
    config_sha256: str
    config: dict[str, Any]
    """The whole resolved configuration."""
    versions: dict[str, str]
    saved_at: str
    """UTC, ISO 8601."""
    files: dict[str, FileFacts]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


class Fragment(NamedTuple):
    """Elements start .. stop-1 of the flattened tensor, at byte `offset` of `file`."""

    file: str
    start: int
    stop: int
    offset: int


class StoredTensor(_Stored):
    dtype: DtypeName
    shape: tuple[NonNegativeInt, ...]
    fragments: tuple[Fragment, ...]
    """Sorted by `start`; together they are the whole tensor."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def gap(self) -> str | None:
        """Why the fragments are not the whole tensor, or None."""
        reached = 0
        for fragment in self.fragments:
            if fragment.start != reached:
                return f"elements {min(reached, fragment.start)} to {max(reached, fragment.start) - 1}"
            reached = fragment.stop
        return f"elements from {reached} on" if reached != self.num_elements else None


class Index(_Stored):
    tensors: dict[str, StoredTensor]
    """By `section/name`."""

    def names(self, section: Section) -> list[str]:
        """Names in the whole model of all tensors of a section, sorted."""
        prefix = section.key("")
        return sorted(key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix))


def manifest_text(manifest: Manifest) -> bytes:
    """Content of `manifest.json`, for people too; its last line is the checksum of the others."""
    content = manifest.model_dump(mode="json")
    content[CHECKSUM_KEY] = _checksum(content)
    return (json.dumps(content, indent=1) + "\n").encode()


def index_text(index: Index) -> bytes:
    """Content of `index.json`."""
    return (index.model_dump_json() + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when the folder is no committed checkpoint or its manifest is damaged."""
    content = _read(folder / MANIFEST_FILE)
    written = content.pop(CHECKSUM_KEY, None)
    if content.get("format") not in (None, FORMAT):
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} has format {content['format']!r}, this version reads {FORMAT!r}."
            " Use the version of mhc_dist that wrote it."
        )
    if written != _checksum(content):
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} is damaged: its content has SHA-256 {_checksum(content)}, it says"
            f" {written}. Use another checkpoint."
        )
    return _validated(Manifest, content, folder / MANIFEST_FILE)


def read_index(folder: Path) -> Index:
    """Raises CheckpointError when it is missing or not an index. Its checksum is in the manifest."""
    return _validated(Index, _read(folder / INDEX_FILE), folder / INDEX_FILE)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: {path.parent} is no committed checkpoint. `mhc-dist inspect RUN` lists"
            " those of a run."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Use another checkpoint.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object. Use another checkpoint.")
    return content


def _validated(kind: type[Document], content: dict[str, Any], path: Path) -> Document:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path} is damaged: {where}: {first['msg']}. Use another checkpoint."
        ) from None
