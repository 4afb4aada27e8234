"""Memory of a rank."""

from typing import Any

import pytest
import torch

from mhc_dist.observe.memory import memory_use


def test_a_process_grows_by_what_it_allocates() -> None:
    """Oracle: 64 MiB that are written, and given back."""
    before = memory_use(torch.device("cpu"))
    block = torch.ones(2**24)
    grown = memory_use(torch.device("cpu"))
    assert grown.allocated_bytes - before.allocated_bytes > 0.9 * block.nbytes
    del block
    # The kernel keeps the two counts apart, and updates them in steps.
    assert memory_use(torch.device("cpu")).peak_bytes > before.allocated_bytes + 0.9 * 2**26


def test_a_gpu_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the figures of a stand-in for torch.cuda."""

    def answer(value: int) -> Any:
        return lambda device: value

    monkeypatch.setattr(torch.cuda, "memory_allocated", answer(3))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", answer(5))
    assert memory_use(torch.device("cuda")) == (3, 5)
