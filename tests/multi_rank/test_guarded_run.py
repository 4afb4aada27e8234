"""Whole runs that are asked to stop, or whose numbers go wrong.

Oracle: the same run left alone, bit for bit where it must be the same, and the exit codes in the README.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_dist.checkpoint.folder import committed
from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.config import RunConfig
from mhc_dist.observe.run_log import LOG_FILE, read_log
from mhc_dist.worker import Worker
from tests.multi_rank.forked_run import ForkedRun, run_to_end, write_corpus
from tests.multi_rank.test_checkpoint import same_tensors
from tests.small import small_config

STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def guarded_config(folder: Path, corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    train = {"name": "run", "output": str(folder), "steps": STEPS, "backend": "gloo"}
    return small_config(
        model={"num_layers": 2, "vocab_size": 256},
        parallel={"pipeline": 1, "data": 2, "expert": 2},
        schedule={"name": "1f1b", "num_microbatches": 2},
        data={"corpus": str(corpus)},
        train=train | {"validate_every": 0, "validation_batches": 1} | sections.pop("train", {}),
        checkpoint={"mode": "sync", "every_steps": 3, "keep_last": 0} | sections.pop("checkpoint", {}),
        observe={"metrics_port": 0},
        **sections,
    )


def losses(config: RunConfig) -> dict[int, object]:
    return {record["step"]: record["loss"] for record in read_log(config.folder)}  # type: ignore[misc]


def summary(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> RunConfig:
    config = guarded_config(tmp_path_factory.mktemp("whole"), corpus)
    run_to_end(config)
    return config


def hold_back(signalled: Path) -> Callable[[int], None]:
    """The second step ends when the signal has been sent, and later ones take a moment, so that it finds the
    run at work."""

    def prepare(rank: int) -> None:
        real = Worker.step
        num_steps = 0

        def step(self: Worker, losses: Sequence[Tensor]) -> float:
            nonlocal num_steps
            num_steps += 1
            while num_steps > 1 and not signalled.exists():
                time.sleep(0.01)
            if num_steps > 1:
                time.sleep(0.3)
            return real(self, losses)

        Worker.step = step  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 83), (signal.SIGUSR1, 84)])
def test_signal_saves_and_ends_with_its_own_code(
    number: signal.Signals, code: int, whole: RunConfig, corpus: Path, tmp_path: Path
) -> None:
    config = guarded_config(tmp_path, corpus, checkpoint={"every_steps": 0}, train={"steps": STEPS})
    signalled = tmp_path / "signalled"
    run = ForkedRun(config, prepare=hold_back(signalled))
    while not (config.folder / LOG_FILE).exists() or not read_log(config.folder):
        assert run.running(), run.output.read_text()
        time.sleep(0.01)
    os.kill(run.ranks[1].pid, number)
    signalled.touch()
    assert run.wait() == [code, code], run.output.read_text()
    (step,) = committed(config.folder / "checkpoints")
    assert f"stopped after step {step} of {STEPS} on request" in run.output.read_text()
    assert not (config.folder / "summary.json").exists()
    run_to_end(config, "--resume", "auto")
    assert losses(config) == losses(whole)
    assert summary(config)["first_step"] == step


def test_a_checkpoint_that_cannot_be_written_at_the_end_has_its_own_code(
    corpus: Path, tmp_path: Path
) -> None:
    config = guarded_config(tmp_path, corpus, train={"steps": 4})

    def prepare(rank: int) -> None:
        from mhc_dist.checkpoint import storage

        real = storage.write_file

        def write_file(path: Path, pieces: Any) -> Any:
            if rank == 1 and "step_00000004" in str(path):
                raise OSError(28, "No space left on device", str(path))
            return real(path, pieces)

        storage.write_file = write_file

    run = ForkedRun(config, prepare=prepare)
    assert run.wait() == [86, 86], run.output.read_text()
    assert "WARNING: no checkpoint of step 4: rank 1: [Errno 28] No space left" in run.output.read_text()
    assert list(committed(config.folder / "checkpoints")) == [3]
    run_to_end(config, "--resume", "auto")
    assert list(committed(config.folder / "checkpoints")) == [3, 4]


def poison(bad_calls: set[int]) -> Callable[[int], None]:
    """In the n-th optimizer steps of this process, for n in `bad_calls`, rank 1 has an infinite gradient."""

    def prepare(rank: int) -> None:
        real = Worker.reduce
        num_calls = 0

        def reduce(self: Worker) -> None:
            nonlocal num_calls
            num_calls += 1
            if rank == 1 and num_calls in bad_calls:
                parameter = next(iter(self.stage.parameters()))
                self.engine.main_gradient(parameter).flatten()[0] = torch.inf
            real(self)

        Worker.reduce = reduce  # type: ignore[method-assign]

    return prepare


def test_one_bad_step_is_skipped_and_counted(whole: RunConfig, corpus: Path, tmp_path: Path) -> None:
    """Until the bad step the run is the one left alone; after it the weights have missed one update."""
    config = guarded_config(tmp_path, corpus)
    run_to_end(config, prepare=poison({5}))
    ours, theirs = losses(config), losses(whole)
    assert [ours[step] == theirs[step] for step in range(1, STEPS + 1)] == [True] * 5 + [False] * 3
    assert (summary(config)["nonfinite_steps"], summary(config)["rollbacks"]) == (1, 0)
    saved = Checkpoint.open(config.folder).manifest.progress
    assert (saved.step, saved.num_updates) == (STEPS, STEPS - 1)


def test_many_bad_steps_lead_back_to_the_checkpoint(whole: RunConfig, corpus: Path, tmp_path: Path) -> None:
    """Steps 4, 5, 6 fail: back to step 3, and on with the text behind it. The state after step 3 is the
    oracle's, the text is not that of its step 4."""
    config = guarded_config(tmp_path, corpus, guard={"max_nonfinite_steps": 3})
    run = ForkedRun(config, prepare=poison({4, 5, 6}))
    assert run.wait() == [0, 0], run.output.read_text()
    output = run.output.read_text()
    assert "resumed from step 3" in output
    ours, theirs = losses(config), losses(whole)
    assert sorted(ours) == list(range(1, STEPS + 1))
    assert [ours[step] == theirs[step] for step in range(1, STEPS + 1)] == [True] * 3 + [False] * 5
    assert (summary(config)["nonfinite_steps"], summary(config)["rollbacks"]) == (3, 1)
    progress = Checkpoint.open(config.folder).manifest.progress
    per_step = config.sequences_per_step
    # Three steps were made twice, the text of none of them.
    assert (progress.step, progress.num_sequences) == (STEPS, (STEPS + 3) * per_step)
    early = ("checkpoints", "step_00000003")
    same_tensors(config.folder.joinpath(*early), whole.folder.joinpath(*early))


def test_a_run_that_stays_bad_is_given_up(corpus: Path, tmp_path: Path) -> None:
    config = guarded_config(tmp_path, corpus, guard={"max_nonfinite_steps": 2, "max_rollbacks": 1})
    run = ForkedRun(config, prepare=poison(set(range(5, 100))))
    assert run.wait() == [85, 85], run.output.read_text()
    failure = json.loads((config.folder / "failure.json").read_text())
    assert failure["exit_code"] == 85
    assert "guard.max_rollbacks=1 returns to the checkpoint of step 3" in failure["message"]
    assert list(committed(config.folder / "checkpoints")) == [3]


def test_bad_steps_before_the_first_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = guarded_config(tmp_path, corpus, checkpoint={"mode": "none"}, guard={"max_nonfinite_steps": 2})
    run = ForkedRun(config, prepare=poison({2, 3}))
    assert run.wait() == [85, 85], run.output.read_text()
    assert "no checkpoint to return to" in json.loads((config.folder / "failure.json").read_text())["message"]


def test_starting_over_a_run_with_checkpoints_is_refused(whole: RunConfig) -> None:
    run = ForkedRun(whole)
    assert run.wait() == [2, 2], run.output.read_text()
    message = json.loads((whole.folder / "failure.json").read_text())["message"]
    assert f"has checkpoints of an earlier run, up to step {STEPS}" in message
    (whole.folder / "failure.json").unlink()


def test_a_run_goes_on_without_the_records_that_do_not_fit(
    tmp_path: Path, corpus: Path, whole: RunConfig
) -> None:
    """Oracle: a run that has room. The kernel's limit on the size of a file stands for a full disk."""
    config = guarded_config(tmp_path, corpus, checkpoint={"mode": "none"})

    def leave_little_room(rank: int) -> None:
        # Enough for the summary and for the first steps. The corpus lies in its cache since the whole run.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    run = ForkedRun(config, prepare=leave_little_room)
    codes = run.wait()
    assert codes == [0, 0], run.output.read_text()
    assert run.output.read_text().count("a record of the run is lost") == 1
    assert summary(config)["steps"] == STEPS
    kept = losses(config)
    assert 0 < len(kept) < STEPS
    assert kept.items() <= losses(whole).items()
