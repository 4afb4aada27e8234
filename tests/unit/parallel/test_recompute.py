"""Oracle: the same step with nothing dropped. Losses and gradients must be equal bit for bit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.recompute import best_block
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.executor import Executor, Microbatch, StepOutput
from mhc_dist.plan.run_programs import plan_run
from tests.small import random_sequences, small_config


class Alone:
    """Neither peers nor an optimizer: one pipeline rank holds all chunks, gradients stay where they are."""

    def drain(self) -> None: ...

    def reduce(self) -> None: ...

    def step(self, losses: list[Tensor]) -> None: ...

    def send(self, tensor: Tensor, peer: int) -> None:
        raise AssertionError(peer)

    def receive(self, peer: int) -> Any:
        raise AssertionError(peer)


def run(config: RunConfig, on_action: Any = None) -> tuple[StepOutput, dict[str, Tensor]]:
    programs = plan_run(config)
    stage = Stage(
        config,
        programs.places,
        make_backend(config.kernels.backend),
        ExpertExchange(config.model.num_experts),
        0,
        torch.device("cpu"),
    )
    tokens, targets = random_sequences(config)
    microbatches = [Microbatch(tokens[i : i + 1], targets[i : i + 1]) for i in range(len(tokens))]
    alone = Alone()
    output = Executor(0, stage.by_index, alone, on_action).run(programs.training, microbatches, alone)
    gradients = {name: p.grad for name, p in stage.logical_parameters() if p.grad is not None}
    return output, gradients


def config_with(mode: str, block: str | int, **sections: dict[str, Any]) -> RunConfig:
    sections.setdefault("schedule", {"name": "zbv", "num_microbatches": 2})
    return small_config(recompute={"mode": mode, "block": block}, **sections)


@pytest.mark.parametrize("kind", ["mhc", "identity"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_recompute_changes_no_bit(schedule: str, backend: str, kind: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "schedule": {"name": schedule, "num_microbatches": 2},
        "kernels": {"backend": backend},
        "residual": {"kind": kind},
    }
    want, want_gradients = run(config_with("none", "auto", **sections))
    for mode, block in (("mhc", "auto"), ("mhc", 2), ("mhc", 4), ("mhc", 16), ("full", "auto")):
        got, gradients = run(config_with(mode, block, **sections))
        recomputed = sum(event.action.kind is ActionKind.RECOMPUTE for event in got.trace.events)
        assert recomputed > 0
        assert all(torch.equal(a, b) for a, b in zip(got.losses, want.losses, strict=True))
        assert gradients.keys() == want_gradients.keys()
        for name, gradient in want_gradients.items():
            assert torch.equal(gradients[name], gradient), f"{mode} {block}: {name}"


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_streams_are_gone_between_forward_and_recompute(
    num_shared_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: weak references to every stream tensor and sublayer input a seam made.

    When the first RECOMPUTE of a chunk begins, only what starts a block may still be there. Without shared
    experts nobody reads the inputs of expert layers but their own phase.
    """
    made: list[weakref.ref[torch.UntypedStorage]] = []
    backend = make_backend("cpu")
    for name in ("open", "cross"):
        original = getattr(type(backend), name)

        def watched(self: Any, *arguments: Any, original: Any = original, name: str = name) -> Any:
            seam = original(self, *arguments)
            if name == "cross":
                made.append(weakref.ref(seam.streams_TNC.untyped_storage()))
            made.append(weakref.ref(seam.h_TC.untyped_storage()))
            return seam

        monkeypatch.setattr(type(backend), name, watched)

    def alive_before_first(kind: ActionKind, mode: str) -> int:
        made.clear()
        found: list[int] = []

        def look(action: Action) -> None:
            if action.kind is kind and not found:
                found.append(sum(reference() is not None for reference in made))

        schedule, model = {"name": "gpipe", "num_microbatches": 1}, {"num_shared_experts": num_shared_experts}
        run(config_with(mode, 16, schedule=schedule, model=model), look)
        return found[0]

    # 16 sublayers: the first one opens the chain, 15 seams are crossed and make streams.
    assert alive_before_first(ActionKind.GRADIENT, "none") == len(made) == 16 + 15
    # Layer 0 is dense and shares a phase with layer 1, so one block of all phases starts at the chain's
    # start, and nothing that a seam made has to stay.
    assert alive_before_first(ActionKind.RECOMPUTE, "mhc") == 0


@pytest.mark.parametrize("num_streams", [2, 4, 8])
def test_block_length_keeps_least(num_streams: int) -> None:
    """Oracle: trying every block length (mHC paper, 4.3.2)."""
    for num_sublayers in range(1, 80):
        rows = {
            block: num_streams * -(-num_sublayers // block) + (num_streams + 2) * block
            for block in range(1, num_sublayers + 1)
        }
        assert rows[best_block(num_sublayers, num_streams)] == min(rows.values())
