"""What a rank's state does on a GPU, as far as a CPU can tell: when it waits, and what it asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_dist.checkpoint import state
from mhc_dist.checkpoint.state import RankState
from mhc_dist.optim.engine_state import FlatFragment, Partition
from mhc_dist.topology import Topology

NUM_ELEMENTS = 6


def rank_state(device: str, partition: Partition) -> RankState:
    """A rank that owns one partition of a model with one router."""
    router = SimpleNamespace(bias_E=torch.zeros(4))
    stage: Any = SimpleNamespace(named_modules=list, routers=lambda: [("layers.0.router", router)])
    engine: Any = SimpleNamespace(partitions=lambda: [partition])
    return RankState(stage, engine, Topology(1, 1, 1, 0), torch.device(device))


def counting_partition() -> Partition:
    fragment = FlatFragment("chunk0.layers.0.norm.weight", (NUM_ELEMENTS,), 0, NUM_ELEMENTS, 0)
    master, first, second = (torch.arange(6.0) + 10 * number for number in range(3))
    return Partition((fragment,), master, first, second)


def test_the_copy_for_an_asynchronous_save_is_complete_when_it_is_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: what the copy holds each time the device is waited for: nothing, then everything."""
    partition = counting_partition()
    this = rank_state("cuda", partition)
    monkeypatch.setattr(state, "_generators", lambda device: {})
    copied = []

    def synchronize(device: torch.device) -> None:
        assert this._staged is not None
        copied.append(torch.equal(this._staged[0].second_moment, partition.second_moment))

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    fragments = this.staged()
    assert copied == [False, True]
    before = {key: fragment.values.clone() for key, fragment in fragments.items()}
    for tensor in (partition.master, partition.first_moment, partition.second_moment):
        tensor.zero_()
    assert before.keys() == {
        "weight/layers.0.norm.weight",
        "first_moment/layers.0.norm.weight",
        "second_moment/layers.0.norm.weight",
        "buffer/layers.0.router.bias_E",
    }
    assert all(torch.equal(fragments[key].values, values) for key, values in before.items())
    assert {fragment.values.device.type for fragment in fragments.values()} == {"cpu"}


@pytest.mark.parametrize("saved_on", ["cpu", "cuda"])
def test_a_generator_that_was_not_saved_is_not_asked_for(
    saved_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what a run on CPUs and one on GPUs save; rank 0 of three takes the generators of rank 0."""
    monkeypatch.setattr(state, "_generators", lambda device: {"cpu": torch.zeros(1), "cuda": torch.zeros(1)})
    there = {f"random/{name}.rank_00000" for name in {"cpu", saved_on}}
    wanted = rank_state("cuda", counting_partition()).to_load(there, num_saved_ranks=3)
    assert {key for key in wanted if key.startswith("random/")} == there
