"""Everything of a rank that a checkpoint keeps, under names that do not depend on the topology.

Masters and moments lie in the optimizer's flat partitions; here they become fragments of named tensors, with
every expert a tensor of its own, whichever rank holds it. The fragments are views: loading fills them in
place, and saving reads them or, when training is to go on meanwhile, a copy in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mhc_dist.checkpoint.manifest import Section
from mhc_dist.model.moe import Experts
from mhc_dist.optim.engine import OptimizerEngine
from mhc_dist.optim.engine_state import FlatFragment, Partition
from mhc_dist.parallel.stage import Stage, logical_name
from mhc_dist.topology import Topology


@dataclass(frozen=True)
class StateFragment:
    """Elements start .. start+len(values)-1 of a flattened tensor of `shape`; `values` is flat."""

    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def num_elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)


Fragments = dict[str, StateFragment]
"""By key, `section/name`. A rank holds one fragment of a tensor at most: its partition is contiguous."""


class RankState:
    """The state of one rank: what it saves, and the places that a load fills."""

    def __init__(
        self, stage: Stage, engine: OptimizerEngine, topology: Topology, device: torch.device
    ) -> None:
        self._stage, self._engine, self._topology, self._device = stage, engine, topology, device
        self._staged: list[Partition] | None = None

    def to_save(self) -> Fragments:
        """What this rank writes. Masters and moments are the optimizer's own tensors, not copies."""
        self._finish_device_work()
        return self._partitioned(self._engine.partitions()) | self._small_to_save()

    def staged(self) -> Fragments:
        """A copy of `to_save` in host memory, which training cannot change.

        The memory is kept and used again: three fp32 numbers for each parameter this rank owns. Nothing in
        it is on a GPU, so that the thread that writes it needs no device and waits for no stream.
        """
        partitions = self._engine.partitions()
        if self._staged is None:
            self._staged = [_host_copy(partition) for partition in partitions]
        self._finish_device_work()
        for copy, partition in zip(self._staged, partitions, strict=True):
            for there, here in zip(_tensors(copy), _tensors(partition), strict=True):
                # Page-locked memory: the copies queue up behind each other, and are waited for once.
                there.copy_(here, non_blocking=True)
        self._finish_device_work()
        return self._partitioned(self._staged) | self._small_to_save()

    def to_load(self, saved: Container[str], num_saved_ranks: int) -> Fragments:
        """Where a load puts what this rank needs. Afterwards call `loaded`.

        A run on more ranks than the saved one takes its generators round robin; a GPU's generator, which no
        run on CPUs has saved, stays as it is.

        saved: the keys of the checkpoint.
        """
        wanted = self._partitioned(self._engine.partitions())
        for name, router in self._stage.routers():
            wanted[Section.BUFFER.key(f"{name}.bias_E")] = _whole(router.bias_E)
        for name, state in _generators(self._device).items():
            key = Section.RANDOM.key(f"{name}.rank_{self._topology.rank % num_saved_ranks:05d}")
            if name == "cpu" or key in saved:
                wanted[key] = _whole(state)
        return wanted

    def loaded(self, fragments: Fragments, num_steps: int, num_updates: int) -> None:
        """Continue from what was loaded into `fragments`. Collective."""
        self._engine.continue_from(num_steps, num_updates)
        for key, fragment in fragments.items():
            if key.startswith(Section.RANDOM.key("")):
                name = key.removeprefix(Section.RANDOM.key("")).partition(".")[0]
                _set_generator(name, fragment.values, self._device)

    def _partitioned(self, partitions: list[Partition]) -> Fragments:
        experts = {
            name: module.first_expert
            for name, module in self._stage.named_modules()
            if isinstance(module, Experts)
        }
        found: Fragments = {}
        for partition in partitions:
            for fragment in partition.fragments:
                for name, piece in _by_logical_name(fragment, experts):
                    for section, flat in (
                        (Section.WEIGHT, partition.master),
                        (Section.FIRST_MOMENT, partition.first_moment),
                        (Section.SECOND_MOMENT, partition.second_moment),
                    ):
                        found[section.key(name)] = StateFragment(piece.shape, piece.start, piece.of(flat))
        return found

    def _small_to_save(self) -> Fragments:
        """Router biases, equal on all data ranks and written by the first; this rank's generators. Copies in
        host memory."""
        small: Fragments = {}
        if self._topology.data_rank == 0:
            for name, router in self._stage.routers():
                small[Section.BUFFER.key(f"{name}.bias_E")] = _whole(router.bias_E.to("cpu", copy=True))
        for name, state in _generators(self._device).items():
            small[Section.RANDOM.key(f"{name}.rank_{self._topology.rank:05d}")] = _whole(state)
        return small

    def _finish_device_work(self) -> None:
        """Wait for what any stream of the GPU still does to the state: an optimizer step, or our copy."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _by_logical_name(fragment: FlatFragment, experts: dict[str, int]) -> Iterator[tuple[str, FlatFragment]]:
    """A fragment of a stacked expert parameter falls into one piece per expert; others stay whole.

    `chunk1.layers.3.feed_forward.experts.down.weight` (experts, ...) becomes
    `layers.3.feed_forward.experts.5.down.weight` (...) and so on.
    """
    path = next((path for path in experts if fragment.name.startswith(f"{path}.")), None)
    if path is None:
        yield logical_name(fragment.name), fragment
        return
    leaf = fragment.name.removeprefix(f"{path}.")
    shape = fragment.shape[1:]
    size = math.prod(shape)
    for local in range(fragment.start // size, math.ceil(fragment.stop / size)):
        start, stop = max(fragment.start, local * size), min(fragment.stop, (local + 1) * size)
        piece = replace(
            fragment,
            shape=shape,
            start=start - local * size,
            stop=stop - local * size,
            begin=fragment.begin + start - fragment.start,
        )
        yield f"{logical_name(path)}.{experts[path] + local}.{leaf}", piece


def _whole(tensor: Tensor) -> StateFragment:
    return StateFragment(tuple(tensor.shape), 0, tensor.view(-1))


def _tensors(partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
    return partition.master, partition.first_moment, partition.second_moment


def _host_copy(partition: Partition) -> Partition:
    """Host memory for a copy of a partition; page-locked where a GPU copies into it."""
    pinned = partition.master.is_cuda
    master, first, second = (
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned) for tensor in _tensors(partition)
    )
    return replace(partition, master=master, first_moment=first, second_moment=second)


def _generators(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators on this rank, bytes on the CPU; new tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_generator(name: str, state: Tensor, device: torch.device) -> None:
    if name == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
