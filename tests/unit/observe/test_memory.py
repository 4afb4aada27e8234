"""Memory of a rank."""

from typing import Any

import pytest
import torch

from mhc_dist.observe.memory import memory_use


def test_a_process_grows_by_what_it_allocates() -> None:
    """Oracle: 256 MiB that are written, and given back.

    A fifth is allowed for: the kernel may take cold pages of this process away meanwhile (10 MiB were seen),
    and it keeps the two counts apart and updates them in steps.
    """
    before = memory_use(torch.device("cpu"))
    block = torch.ones(2**26)
    grown = memory_use(torch.device("cpu"))
    assert grown.allocated_bytes - before.allocated_bytes > 0.8 * block.nbytes
    del block
    assert memory_use(torch.device("cpu")).peak_bytes > before.allocated_bytes + 0.8 * 2**28


def test_a_gpu_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the figures of a stand-in for torch.cuda."""

    def answer(value: int) -> Any:
        return lambda device: value

    monkeypatch.setattr(torch.cuda, "memory_allocated", answer(3))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", answer(5))
    assert memory_use(torch.device("cuda")) == (3, 5)
