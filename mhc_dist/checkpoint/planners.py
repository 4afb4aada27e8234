"""How torch.distributed.checkpoint learns who writes and reads which fragment.

To it every tensor is one long vector and a fragment is a chunk of it. It gathers everyone's plans on rank 0,
checks there that the chunks cover every tensor exactly once, and on loading works out which parts of which
stored chunks make up each wanted one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mhc_dist.checkpoint.manifest import CheckpointError
from mhc_dist.checkpoint.state import Fragments, StateFragment


class FragmentSavePlanner(DefaultSavePlanner):
    """Plans to write a rank's `Fragments`, which are its state dict."""

    state_dict: Fragments

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(key, fragment) for key, fragment in self.state_dict.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.state_dict[write_item.index.fqn].values


class FragmentLoadPlanner(DefaultLoadPlanner):
    """Plans to fill a rank's `Fragments` in place."""

    state_dict: Fragments

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Raises CheckpointError when the checkpoint lacks a tensor or has another size for it."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, fragment in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint has no {key}. It was saved from another model.")
            if stored.size != _size(fragment):
                raise CheckpointError(
                    f"the checkpoint has {stored.size[0]} elements of {key}, this run"
                    f" {fragment.num_elements}. It was saved from another model."
                )
            items += create_read_items_for_chunk_list(key, stored, [_chunk(fragment)])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        begin, count = read_item.dest_offsets[0], read_item.lengths[0]
        return self.state_dict[read_item.dest_index.fqn].values[begin : begin + count]


def _write_item(key: str, fragment: StateFragment) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key, torch.Size([fragment.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(fragment),
            properties=TensorProperties(dtype=fragment.values.dtype),
            size=_size(fragment),
        ),
    )


def _size(fragment: StateFragment) -> torch.Size:
    return torch.Size([fragment.num_elements])


def _chunk(fragment: StateFragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([fragment.start]), torch.Size([fragment.values.numel()]))
