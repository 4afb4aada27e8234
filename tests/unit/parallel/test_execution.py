"""What the executor does when, seen from outside while a rank's program really runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.model.linear import GroupedLinear, Linear
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.receives import COMPUTE_KINDS
from mhc_dist.pipeline.streams import Flight, HostStreams, tensors_in
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


def test_a_transfer_is_given_all_memory_that_it_touches() -> None:
    """Oracle: the tensors that torch.distributed is called with, for every transfer of a step."""
    lanes: set[str] = set()

    class Watched(HostStreams):
        def transfer(self, lane: str, start: Any, buffers: Any) -> Flight:
            lanes.add(lane)
            touched: list[int] = []

            def watched(real: Any) -> Any:
                def call(*arguments: Any, **named: Any) -> Any:
                    touched.extend(tensor.data_ptr() for tensor in tensors_in(arguments))
                    return real(*arguments, **named)

                return call

            with pytest.MonkeyPatch.context() as patch:
                for name in ("all_to_all_single", "isend", "irecv"):
                    patch.setattr(dist, name, watched(getattr(dist, name)))
                flight = super().transfer(lane, start, buffers)
            assert sorted(touched) == sorted(tensor.data_ptr() for tensor in buffers)
            return flight

    run_steps(recorded_config("1f1b"), 0, Watched())
    assert lanes == {"exchange F", "exchange B", "message 0>1", "message 1>0"}


@pytest.mark.parametrize("schedule", ["zb1p", "zbv", "dualpipev"])
def test_weight_gradients_wait_for_their_action_and_go_to_their_sum(schedule: str) -> None:
    """Oracle: the program: what GRADIENT puts off reaches the optimizer's sum in a WEIGHT, what it does not
    put off at once, and nothing `.grad`, where it would be rounded to the parameter's dtype.
    """
    now: list[Action] = []
    delivered: set[tuple[str, ActionKind, bool]] = set()
    stages: list[Stage] = []

    def prepare(stage: Stage) -> None:
        stages.append(stage)
        for module in stage.modules():
            if isinstance(module, Linear | GroupedLinear):
                main = torch.zeros_like(module.weight, dtype=torch.float32)

                def gradient_sum(main: Tensor = main) -> Tensor:
                    assert not torch.is_grad_enabled()
                    delivered.add((now[-1].item, now[-1].kind, now[-1].defer_weights))
                    return main

                module.weight.gradient_sum = gradient_sum  # type: ignore[attr-defined]

    config = recorded_config(schedule)
    run_steps(config, 0, HostStreams(), prepare=prepare, on_action=now.append)
    weights = [a for a in now if a.kind is ActionKind.WEIGHT]
    assert weights, f"{schedule} puts weight gradients off"
    assert {(item, defer) for item, kind, defer in delivered if kind is ActionKind.WEIGHT} == {
        (a.item, False) for a in weights
    }
    at_once = {a.item for a in now if a.kind is ActionKind.GRADIENT and not a.defer_weights}
    others = {(item, kind) for item, kind, _ in delivered if kind is not ActionKind.WEIGHT}
    assert others <= {(item, ActionKind.GRADIENT) for item in at_once}
    assert bool(others) == bool(at_once & {a.item for a in weights})
    for name, parameter in stages[0].named_parameters():
        if hasattr(parameter, "gradient_sum"):
            assert parameter.grad is None, name
