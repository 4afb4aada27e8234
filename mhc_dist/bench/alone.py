"""One process without peers or optimizer: what benches of single-rank work run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.optim.parameter_groups import cast_to_bf16
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.executor import Microbatch
from mhc_dist.plan.run_programs import RunPrograms


class Nobody:
    """Neither pipeline neighbours nor the end of a step: gradients stay where they are."""

    def drain(self) -> None: ...

    def reduce(self) -> None: ...

    def step(self, losses: Sequence[Tensor]) -> None: ...

    def send(self, tensor: Tensor, peer: int) -> None:
        raise AssertionError(f"one pipeline rank has no neighbour {peer}")

    def receive(self, peer: int) -> Any:
        raise AssertionError(f"one pipeline rank has no neighbour {peer}")


def whole_stage(config: RunConfig, programs: RunPrograms) -> Stage:
    """All chunks with all experts on this process, in the run's number format."""
    stage = Stage(
        config,
        programs.places,
        make_backend(config.kernels.backend),
        ExpertExchange(config.model.num_experts),
        0,
        torch.device("cpu"),
    )
    if config.train.precision == "bf16":
        cast_to_bf16(stage)
    return stage


def random_microbatches(config: RunConfig, seed: int = 0) -> list[Microbatch]:
    """Random tokens, one set for each microbatch of a step."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, config.data.sequences_per_microbatch, config.data.sequence_length)
    return [
        Microbatch(*torch.randint(config.model.vocab_size, size, generator=generator))
        for _ in range(config.schedule.num_microbatches)
    ]
