"""When the host waits for the device while phases run: once per expert layer and microbatch, for counts.

On tensors without values, whatever needs a value on the host raises: a comparison, a size that depends on
data, `item`. So a step that runs through on them is one that a GPU can be given without being waited for.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from mhc_dist.parallel.expert_exchange import plan_arrival
from mhc_dist.pipeline.action import ActionKind
from mhc_dist.plan.run_programs import plan_run
from tests.unit.parallel.recorded_run import recorded_config, run_unrecorded

COUNTS = [4, 4, 4, 4, 4, 4]
"""8 rows a rank, spread evenly: to and from each of two ranks, and for each of two experts."""


@pytest.mark.parametrize("recompute", ["none", "mhc", "full"])
def test_a_step_asks_the_device_once_per_expert_layer(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the WAITs for counts in the program, against calls of Tensor.tolist; nothing else may ask."""
    asked: list[torch.Size] = []

    def tolist(tensor: Tensor) -> list[int]:
        asked.append(tensor.shape)
        return COUNTS

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    # Moving parameters without values is not implemented, nor needed: they are where they should be.
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    config = recorded_config("zb1p", recompute)
    waits = [
        action
        for action in plan_run(config).training.actions[0]
        if action.kind is ActionKind.WAIT and action.item.startswith("counts")
    ]
    with FakeTensorMode():
        run_unrecorded(config, 0)
    assert len(asked) == len(waits) > 0
    assert set(asked) == {(len(COUNTS),)}


def test_tensors_without_values_notice() -> None:
    """Oracle: counts themselves, which cannot be planned with as long as nobody has asked for them."""
    with FakeTensorMode():
        counts_GE = torch.zeros(2, 2, dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            plan_arrival(counts_GE, counts_GE)
