"""Resuming: choose a checkpoint all ranks agree on, verify it together, read only what is needed.

Every step is collective: all ranks do the same, whatever their own part of a checkpoint looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_fragments

from mhc_dist.checkpoint.folder import (
    DAMAGED,
    FOLDER,
    SUPERSEDED,
    committed,
    remove_uncommitted,
    set_aside,
)
from mhc_dist.checkpoint.manifest import CheckpointError, Index, Manifest, read_index, read_manifest
from mhc_dist.checkpoint.planners import FragmentLoadPlanner
from mhc_dist.checkpoint.resume import candidates
from mhc_dist.checkpoint.state import RankState
from mhc_dist.checkpoint.storage import FolderReader
from mhc_dist.checkpoint.verify import damages


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that all ranks found in order; `passed_over`, newest first: damaged, and why."""

    folder: Path
    manifest: Manifest
    index: Index
    passed_over: tuple[tuple[Path, str], ...] = ()


def choose(request: str, run_folder: Path, group: dist.ProcessGroup) -> Chosen | None:
    """The checkpoint to resume from; None when `auto` finds none at all. Collective over `group`.

    Ranks share the reading: each verifies every n-th file. Raises CheckpointError, on all ranks alike, when
    nothing that was asked for is in order.
    """
    wanted = from_first_rank(lambda: candidates(request, run_folder), group)
    passed_over: list[tuple[Path, str]] = []
    for folder in wanted.folders:
        found = _verify(folder, group)
        if found.facts is not None and not found.damages:
            return Chosen(folder, *found.facts, tuple(passed_over))
        passed_over.append((folder, "; ".join(found.damages)))
        if not wanted.fall_back:
            break
    if passed_over:
        told = "; ".join(why for _, why in passed_over)
        raise CheckpointError(
            f"no checkpoint to resume from can be used: {told}. Name another one with --resume, or start"
            " anew without it."
        )
    return None


def load(chosen: Chosen, state: RankState, group: dist.ProcessGroup) -> None:
    """Take this rank's part of a verified checkpoint. Collective. Raises CheckpointError on all ranks."""
    topology, progress = chosen.manifest.topology, chosen.manifest.progress
    fragments = state.to_load(chosen.index.tensors, topology.pipeline * topology.data)
    try:
        load_fragments(
            fragments,
            storage_reader=FolderReader(chosen.folder, chosen.index),
            planner=FragmentLoadPlanner(),
            process_group=group,
        )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, (OSError, CheckpointError)):
            # torch's own is no Exception, and nobody would catch it.
            raise RuntimeError(str(error)) from error
        raise CheckpointError(f"{chosen.folder} cannot be loaded: rank {rank}: {cause}") from error
    state.loaded(fragments, progress.step, progress.num_updates)


def tidy(run_folder: Path, step: int, damaged: tuple[Path, ...] = ()) -> list[str]:
    """Make room for what the run will save after `step`; on rank 0, before the first save. What was done.

    Unfinished saves are deleted; damaged checkpoints, and those of steps that will now be made anew, are
    renamed.
    """
    checkpoints = run_folder / FOLDER
    told = [f"{folder} was never committed; deleted" for folder in remove_uncommitted(checkpoints)]
    for folder in damaged:
        told.append(f"{folder} is damaged; renamed to {set_aside(folder, DAMAGED).name}")
    for later, folder in committed(checkpoints).items():
        if later > step:
            told.append(f"{folder} is of a later step; renamed to {set_aside(folder, SUPERSEDED).name}")
    return told


class _Verified(NamedTuple):
    """Manifest and index, None where this rank could not read them; what any rank found wrong."""

    facts: tuple[Manifest, Index] | None
    damages: list[str]


def _verify(folder: Path, group: dist.ProcessGroup) -> _Verified:
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    facts: tuple[Manifest, Index] | None = None
    found: list[str] = []
    try:
        manifest = read_manifest(folder)
        found = list(damages(folder, manifest, list(manifest.files)[rank::num_ranks]))
        facts = manifest, read_index(folder)
    except CheckpointError as error:
        found = [*found, str(error)]
    everyones: list[Any] = [None] * num_ranks
    dist.all_gather_object(everyones, found, group=group)
    return _Verified(facts, list(dict.fromkeys(sentence for part in everyones for sentence in part)))


def from_first_rank(make: Any, group: dist.ProcessGroup) -> Any:
    """What rank 0 makes, on all ranks; its CheckpointError, too. File systems may show others less."""
    made: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            made[0] = make()
        except CheckpointError as error:
            made[0] = error
    dist.broadcast_object_list(made, src=0, group=group)
    if isinstance(made[0], CheckpointError):
        raise made[0]
    return made[0]
