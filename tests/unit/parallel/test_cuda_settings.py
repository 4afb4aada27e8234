"""What a rank on a GPU sets and refuses, on machines that have none."""

from __future__ import annotations

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mhc_dist.parallel.cuda_settings import check_cuda_settings, cuda_settings
from mhc_dist.parallel.process_groups import ProcessGroups, abandon, init_distributed
from mhc_dist.topology import Topology


def test_what_is_left_open_is_set() -> None:
    """Oracle: CUDA's largest number of queues, by hand; what the user has set stays."""
    want = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "CUDA_MODULE_LOADING": "EAGER",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    assert cuda_settings({}) == want
    assert cuda_settings(want) == {}
    given = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "CUDA_MODULE_LOADING": "EAGER",
        "PYTORCH_CUDA_ALLOC_CONF": "backend:native",
    }
    assert cuda_settings(given | {"CUDA_LAUNCH_BLOCKING": "0"}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "many"),
        ("CUDA_LAUNCH_BLOCKING", "1"),
        ("CUDA_MODULE_LOADING", "LAZY"),
        ("TORCH_NCCL_BLOCKING_WAIT", "1"),
    ],
)
def test_what_would_hang_is_refused(name: str, value: str) -> None:
    """Oracle: the message names the variable, its value and the remedy."""
    with pytest.raises(ValueError, match=rf"{name}={value}: .*[Uu]nset it"):
        cuda_settings({name: value})


class _Options:
    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream


class _GroupsOfGpus:
    """Stands for torch.distributed with NCCL: writes down the groups that are asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, world_size: int) -> None:
        self.urgent: dict[tuple[int, ...], list[bool]] = {}
        nccl = SimpleNamespace(Options=_Options)
        patch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
        patch.setattr(dist, "get_backend", lambda: "nccl")
        patch.setattr(dist, "get_world_size", lambda: world_size)
        patch.setattr(dist, "get_rank", lambda: 0)
        patch.setattr(dist, "new_group", self._new_group)

    def _new_group(self, ranks: list[int], timeout: timedelta, backend: Any, pg_options: Any) -> object:
        assert pg_options is None or pg_options._timeout == timeout
        urgent = pg_options is not None and pg_options.is_high_priority_stream
        assert not (urgent and backend == "gloo")
        self.urgent.setdefault(tuple(ranks), []).append(urgent)
        return object()


def test_what_compute_hides_is_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: by hand, for two stages of two ranks: both exchanges and all channels, and nothing else."""
    groups = _GroupsOfGpus(monkeypatch, 4)
    ProcessGroups.build(Topology(2, 2, 2, 0))
    assert groups.urgent == {
        (0, 1): [True, True, False],
        (2, 3): [True, True, False],
        **{pair: [True] for pair in ((0, 2), (2, 0), (1, 3), (3, 1))},
        (0, 1, 2, 3): [False, False],
    }


def test_a_rank_on_a_gpu_insists_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what is missing, by hand; with all of it the rank gets its device. By then CUDA has read its
    variables, so that setting them would come too late.
    """
    place: Any = SimpleNamespace(
        rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="127.0.0.1", master_port=0
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(os, "environ", {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_ALLOC_CONF": ""})
    with pytest.raises(ValueError, match=r"^CUDA_MODULE_LOADING must be set .* CUDA_MODULE_LOADING=EAGER\.$"):
        init_distributed(place, "auto", 1.0)
    os.environ |= cuda_settings(os.environ)
    check_cuda_settings(os.environ)
    assert init_distributed(place, "auto", 1.0) == torch.device("cuda", 0)


def test_a_world_that_is_abandoned_is_left() -> None:
    """Oracle: torch.distributed, which knows no world afterwards; a second time there is nothing to leave."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    abandon()
    assert not dist.is_initialized()
    abandon()
