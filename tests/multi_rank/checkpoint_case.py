"""Ranks that train a small model, save it, and go on from what others saved."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mhc_dist.checkpoint.load import choose, load
from mhc_dist.checkpoint.manifest import Progress
from mhc_dist.checkpoint.outcome import SaveOutcome
from mhc_dist.checkpoint.save import Saver
from mhc_dist.checkpoint.state import RankState
from mhc_dist.config import RunConfig
from mhc_dist.data.batches import Sequences
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.train import train_step
from mhc_dist.worker import Worker
from tests.small import random_sequences, small_config

CORPUS = "random"
NUM_SEQUENCES = 4
"""In the global batch, on every topology."""


def checkpoint_config(
    topology: tuple[int, int, int],
    schedule: str = "dualpipev",
    kind: str = "mhc",
    **sections: dict[str, object],
) -> RunConfig:
    pipeline, data, expert = topology
    return small_config(
        # A layer for every stage of the longest pipeline, and no more: there are many steps to make.
        model={"num_layers": 4},
        parallel={"pipeline": pipeline, "data": data, "expert": expert},
        schedule={"name": schedule, "num_microbatches": NUM_SEQUENCES // data},
        residual={"kind": kind, "num_streams": 1 if kind == "residual" else 4},
        train={"steps": 60, **sections.pop("train", {})},
        **sections,
    )


class FixedBatches:
    """Stands in for `Batches`: random sequences, the same for all topologies."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def sequences(self, step: int, first: int, count: int) -> Sequences:
        tokens, targets = random_sequences(self._config, step)
        return Sequences(tokens[first : first + count].numpy(), targets[first : first + count].numpy())


class Rank(NamedTuple):
    """One rank, built and able to train, save and load."""

    worker: Worker
    state: RankState
    group: dist.ProcessGroup

    def train(self, first_step: int, num_steps: int) -> list[tuple[float, float]]:
        """Losses and gradient norms."""
        batches = FixedBatches(self.worker.config)
        figures = [
            train_step(self.worker, batches, step)  # type: ignore[arg-type]
            for step in range(first_step, first_step + num_steps)
        ]
        return [(step.loss, step.grad_norm) for step in figures]

    def saver(self, run_folder: Path) -> Saver:
        return Saver(
            self.worker.config,
            run_folder / "checkpoints",
            self.state,
            self.group,
            CORPUS,
            lambda *_, **__: None,
        )

    def progress(self, step: int) -> Progress:
        tokens = self.worker.config.tokens_per_step
        return Progress(
            step=step,
            num_updates=self.worker.engine.num_updates,
            num_sequences=step * NUM_SEQUENCES,
            num_tokens=step * tokens,
        )

    def save(self, run_folder: Path, step: int) -> SaveOutcome:
        return self.saver(run_folder).save(self.progress(step), learning_rate=0.0)

    def load(self, run_folder: Path, request: str = "auto") -> int:
        """Returns the step."""
        chosen = choose(request, run_folder, self.group)
        assert chosen is not None
        load(chosen, self.state, self.group)
        return chosen.manifest.progress.step


def build_rank(rank: int, config: RunConfig) -> Rank:
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    programs = plan_run(config)
    groups = ProcessGroups.build(topology, links=programs.training.links)
    device = torch.device("cpu")
    worker = Worker.build(config, programs, topology, groups, device)
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=60))
    assert group is not None
    return Rank(worker, RankState(worker.stage, worker.engine, topology, device), group)
