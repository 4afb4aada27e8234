"""How torch.distributed.checkpoint writes and reads our folders: safetensors files and two JSON files.

Its own safetensors storage keeps no shapes and no checksums, serialises a rank's whole state in memory, and
has every rank open every file to find its parts; its default storage keeps metadata as a pickle. Here a rank
streams its fragments into one file, rank 0 gathers where everything went and commits, and a reader opens only
the files it needs.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from mhc_dist.checkpoint.disk import sync_folder, write_file
from mhc_dist.checkpoint.folder import UNCOMMITTED, point_latest
from mhc_dist.checkpoint.manifest import (
    INDEX_FILE,
    ITEM_BYTES,
    MANIFEST_FILE,
    CheckpointError,
    DtypeName,
    FileFacts,
    Fragment,
    Index,
    Manifest,
    StoredTensor,
    index_text,
    manifest_text,
)
from mhc_dist.checkpoint.planners import FragmentSavePlanner
from mhc_dist.checkpoint.read import DTYPES, read_into

ALIGNMENT_BYTES = 64
DTYPE_NAMES: dict[torch.dtype, DtypeName] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Written:
    """What rank 0 learns about one fragment: where it went, and the file as a whole."""

    dtype: DtypeName
    shape: tuple[int, ...]
    fragment: Fragment
    facts: FileFacts


class FolderWriter(StorageWriter):
    """Writes one checkpoint to `folder`, which appears when everything is there.

    describe: the manifest, given size and checksum of all other files; called on rank 0.
    after_commit: called on rank 0 once the checkpoint is there.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        describe: Callable[[dict[str, FileFacts]], Manifest],
        after_commit: Callable[[], None] | None = None,
    ) -> None:
        self._folder, self._rank, self._describe = folder, rank, describe
        self._after_commit = after_commit
        self._unfinished = folder.with_name(folder.name + UNCOMMITTED)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            # What an earlier attempt at this step left; nobody else writes under this name now.
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, FragmentSavePlanner)
        name = f"rank_{self._rank:05d}.safetensors"
        keys = [item.index.fqn for item in plan.items]
        header, offsets = _header({key: planner.state_dict[key].values for key in keys})
        pieces = (_bytes_of(planner.resolve_data(item)) for item in plan.items)
        num_bytes, sha256 = write_file(self._unfinished / name, itertools.chain([header], pieces))
        facts = FileFacts(num_bytes=num_bytes, sha256=sha256)
        results = []
        for item in plan.items:
            key = item.index.fqn
            fragment = planner.state_dict[key]
            place = Fragment(name, fragment.start, fragment.stop, offsets[key])
            written = _Written(DTYPE_NAMES[fragment.values.dtype], fragment.shape, place, facts)
            results.append(WriteResult(item.index, fragment.values.nbytes, written))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, on rank 0 after all ranks have written. Until the rename there is no checkpoint."""
        written = [(result.index.fqn, result.storage_data) for part in results for result in part]
        files = {entry.fragment.file: entry.facts for _, entry in written}
        for name, facts in files.items():
            self._check_visible(name, facts)
        num_bytes, sha256 = write_file(self._unfinished / INDEX_FILE, [index_text(_index(written))])
        files[INDEX_FILE] = FileFacts(num_bytes=num_bytes, sha256=sha256)
        manifest = self._describe(dict(sorted(files.items())))
        write_file(self._unfinished / MANIFEST_FILE, [manifest_text(manifest)])
        sync_folder(self._unfinished)
        os.replace(self._unfinished, self._folder)
        sync_folder(self._folder.parent)
        point_latest(self._folder.parent, self._folder)
        if self._after_commit is not None:
            self._after_commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # made with its folder, never chosen by torch for an id

    def _check_visible(self, name: str, facts: FileFacts) -> None:
        path = self._unfinished / name
        found = path.stat().st_size if path.exists() else None
        if found != facts.num_bytes:
            raise CheckpointError(
                f"{path} was written with {facts.num_bytes} bytes, rank 0 sees"
                f" {'no such file' if found is None else f'{found} bytes'}. All nodes must share the file"
                " system of train.output."
            )


class FolderReader(StorageReader):
    """Reads fragments of a committed checkpoint. Verifying it is `load.py`'s business."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._places = {
            MetadataIndex(key, torch.Size([fragment.start])): (fragment, tensor.dtype)
            for key, tensor in index.tensors.items()
            for fragment in tensor.fragments
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size([tensor.num_elements]),
                    [
                        ChunkStorageMetadata(torch.Size([part.start]), torch.Size([part.stop - part.start]))
                        for part in tensor.fragments
                    ],
                )
                for key, tensor in self._index.tensors.items()
            },
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            fragment, dtype = self._places[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            host = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
            offset = fragment.offset + item.storage_offsets[0] * ITEM_BYTES[dtype]
            read_into(host, self._folder / fragment.file, offset)
            if host is not target:
                target.copy_(host)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # see FolderWriter


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file with these flat tensors in order, and where each begins in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, values in tensors.items():
        begin, position = position, position + values.nbytes
        dtype = DTYPE_NAMES[values.dtype]
        entries[key] = {"dtype": dtype, "shape": [values.numel()], "data_offsets": [begin, position]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: len(head) + entries[key]["data_offsets"][0] for key in tensors}


def _bytes_of(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().numpy().data.cast("B")


def _index(written: list[tuple[str, _Written]]) -> Index:
    """Raises AssertionError if the fragments are not whole tensors: the planner has checked that."""
    by_key: dict[str, list[_Written]] = {}
    for key, entry in written:
        by_key.setdefault(key, []).append(entry)
    tensors = {}
    for key, entries in sorted(by_key.items()):
        fragments = tuple(sorted((entry.fragment for entry in entries), key=lambda part: part.start))
        tensors[key] = StoredTensor(dtype=entries[0].dtype, shape=entries[0].shape, fragments=fragments)
        assert {entry.shape for entry in entries} == {entries[0].shape}, f"{key}: ranks disagree on its shape"
        assert tensors[key].gap() is None, f"{key} lacks {tensors[key].gap()}"
    return Index(tensors=tensors)
