"""Oracle: the run that nobody killed: every loss, gradient norm and validation loss, and the last state.

Killed is one rank, with SIGKILL, at a moment drawn from a seed: some time into a step, or into a save. What
else the moment hits is left to chance, and every outcome must be right.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from mhc_dist.checkpoint.folder import committed
from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.config import RunConfig
from mhc_dist.observe.run_log import LOG_FILE, read_log
from tests.multi_rank.forked_run import ForkedRun, run_to_end, write_corpus
from tests.multi_rank.test_checkpoint import same_tensors
from tests.small import small_config

STEPS, EVERY = 8, 2
REPRODUCED = ("step", "loss", "grad_norm", "learning_rate", "validation_loss", "expert_load_max_to_mean")
SEEDS = (1, 2, 3)
"""Of a step, of a save, of either."""


class Moment(NamedTuple):
    rank: int
    after_step: int
    in_save: bool
    delay_seconds: float


def moment(seed: int, num_ranks: int) -> Moment:
    draw = random.Random(seed)
    in_save = seed % 2 == 0
    return Moment(
        draw.randrange(num_ranks),
        draw.randrange(1, STEPS - 1),
        in_save,
        draw.uniform(0.0, 0.03 if in_save else 0.2),
    )


def kill_config(folder: Path, corpus: Path, mode: str) -> RunConfig:
    return small_config(
        model={"num_layers": 4, "vocab_size": 256},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": "dualpipev", "num_microbatches": 4},
        data={"corpus": str(corpus)},
        train={
            "name": "run",
            "output": str(folder),
            "steps": STEPS,
            "validate_every": 5,
            "validation_batches": 1,
            "backend": "gloo",
        },
        checkpoint={"mode": mode, "every_steps": EVERY, "keep_last": 3},
        observe={"metrics_port": 0},
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> RunConfig:
    """A run that was left alone."""
    config = kill_config(tmp_path_factory.mktemp("whole"), corpus, "sync")
    run_to_end(config)
    return config


def reproduced(config: RunConfig) -> list[list[object]]:
    return [[record.get(key) for key in REPRODUCED] for record in read_log(config.folder)]


def wait_for(run: ForkedRun, config: RunConfig, when: Moment) -> None:
    """Until the moment has come, or the run is over."""

    def come() -> bool:
        log = config.folder / LOG_FILE
        if not log.exists() or log.read_bytes().count(b"\n") < when.after_step:
            return False
        return not when.in_save or any((config.folder / "checkpoints").glob("step_*.tmp"))

    while run.running() and not come():
        time.sleep(0.001)
    time.sleep(when.delay_seconds)


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_run_continues_bit_equal(seed: int, whole: RunConfig, corpus: Path, tmp_path: Path) -> None:
    config = kill_config(tmp_path, corpus, "async" if seed % 3 else "sync")
    when = moment(seed, config.num_processes)
    run = ForkedRun(config)
    wait_for(run, config, when)
    run.kill(when.rank)
    codes = run.wait()
    there = committed(config.folder / "checkpoints")
    print(f"seed {seed}: {when}, exit codes {codes}, committed {list(there)}")
    for folder in there.values():
        Checkpoint.open(folder)  # whatever is committed is whole
    run_to_end(config, "--resume", "auto")
    output = run.output.read_text()
    assert (f"resumed from step {max(there)}" if there else "starting at step 0") in output, output
    assert reproduced(config) == reproduced(whole)
    same_tensors(config.folder, whole.folder)
