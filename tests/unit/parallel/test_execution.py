"""What the executor does when, seen from outside while a rank's program really runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_dist.model.linear import GroupedLinear, Linear
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.streams import Flight, HostStreams
from tests.unit.parallel.recorded_run import recorded_config, run_steps

TRAINED = ("1f1b", "zb1p", "zbv", "dualpipev", "interleaved", "gpipe")


class _Watched(HostStreams):
    """The CPU's streams; tells when the transfer of a received message starts."""

    def __init__(self, history: list[Action | str]) -> None:
        self.history = history

    def transfer(self, lane: str, start: Any, buffers: Any) -> Flight:
        if lane == "message 1>0":
            self.history.append("posted")
        return super().transfer(lane, start, buffers)


@pytest.mark.parametrize("cluster", [None, "laptop"])
@pytest.mark.parametrize("schedule", TRAINED)
def test_receives_are_posted_before_there_is_nothing_else_to_do(schedule: str, cluster: str | None) -> None:
    """Oracle: the order of events: RECV posts a receive, and the rank computes before it needs it."""
    history: list[Action | str] = []
    config = recorded_config(schedule, cluster=cluster)
    run_steps(config, 0, _Watched(history), on_action=history.append)
    posted_at: dict[tuple[object, ...], int] = {}
    num_computed = 0
    for before, event in zip([None, *history], history, strict=False):
        if event == "posted":
            assert isinstance(before, Action)
            assert before.kind is ActionKind.RECV
            posted_at[before.chunk, before.microbatch, before.direction] = num_computed
        elif isinstance(event, Action) and event.kind in COMPUTE_KINDS:
            num_computed += 1
        elif isinstance(event, Action) and event.kind is ActionKind.ARRIVE:
            assert posted_at.pop((event.chunk, event.microbatch, event.direction)) < num_computed
    assert not posted_at
    assert "posted" in history


@pytest.mark.parametrize("schedule", ["zb1p", "zbv", "dualpipev"])
def test_weight_gradients_wait_for_their_action_and_go_to_their_sink(schedule: str) -> None:
    """Oracle: the program: what GRADIENT puts off reaches the optimizer's sum in a WEIGHT, never `.grad`.

    What a backward that is not split computes goes through `.grad`, from where the engine's hook moves it.
    """
    now: list[Action] = []
    delivered: Counter[tuple[str, ActionKind, bool]] = Counter()
    stages: list[Stage] = []

    def prepare(stage: Stage) -> None:
        stages.append(stage)
        for module in stage.modules():
            if isinstance(module, Linear | GroupedLinear):
                main = torch.zeros_like(module.weight, dtype=torch.float32)

                def add(gradient: Tensor, main: Tensor = main) -> None:
                    assert not torch.is_grad_enabled()
                    main.add_(gradient)
                    delivered[now[-1].item, now[-1].kind, now[-1].defer_weights] += 1

                module.weight.accumulate_gradient = add  # type: ignore[attr-defined]

    config = recorded_config(schedule)
    run_steps(config, 0, HostStreams(), prepare=prepare, on_action=now.append)
    weights = [a for a in now if a.kind is ActionKind.WEIGHT]
    assert weights, f"{schedule} puts weight gradients off"
    assert {kind for _, kind, _ in delivered} == {ActionKind.WEIGHT}
    assert {item for item, *_ in delivered} == {a.item for a in weights}
    split_everywhere = all(a.defer_weights for a in now if a.kind is ActionKind.GRADIENT)
    for name, parameter in stages[0].named_parameters():
        if hasattr(parameter, "accumulate_gradient"):
            assert parameter.grad is None or not split_everywhere, name
