"""Oracle: the run that was never interrupted, and the tensors of the checkpoint it was resumed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhc_dist.checkpoint.manifest import Section
from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.config import RunConfig
from tests.multi_rank.checkpoint_case import build_rank, checkpoint_config
from tests.multi_rank.harness import run_ranks

HOME, HOME_SCHEDULE = (2, 2, 2), "zb1p"
ABROAD = [((1, 2, 1), "dualpipev"), ((4, 1, 1), "1f1b"), ((1, 4, 4), "gpipe")]
FIRST, FOLLOWING = 3, 20


def home_config() -> RunConfig:
    return checkpoint_config(HOME, HOME_SCHEDULE)


def train_and_save(rank: int, config: RunConfig, folder: Path) -> list[tuple[float, float]]:
    this = build_rank(rank, config)
    this.train(0, FIRST)
    assert this.save(folder, FIRST).failure is None
    return this.train(FIRST, FOLLOWING)


def move(
    rank: int, config: RunConfig, source: Path, target: Path, num_steps: int
) -> list[tuple[float, float]]:
    """Load and save again without a step in between, then go on."""
    this = build_rank(rank, config)
    step = this.load(source)
    assert this.save(target, step).failure is None
    return this.train(step, num_steps)


def same_tensors(first: Path, second: Path) -> None:
    """Everything but the generators, of which there are as many as ranks, bit for bit."""
    one, other = Checkpoint.open(first), Checkpoint.open(second)
    assert one.manifest.progress == other.manifest.progress
    sections = (Section.WEIGHT, Section.FIRST_MOMENT, Section.SECOND_MOMENT, Section.BUFFER)
    for section in sections:
        assert one.names(section) == other.names(section)
        assert one.names(section)
        for name in one.names(section):
            assert torch.equal(one.load_tensor(name, section), other.load_tensor(name, section)), name


pytestmark = pytest.mark.timeout(300)  # two starts of up to four ranks each, on a machine that may be busy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint of three steps on HOME, and the twenty steps that followed there."""
    folder = tmp_path_factory.mktemp("home")
    ranks = run_ranks(4, train_and_save, home_config(), folder, timeout_seconds=110)
    return folder, ranks[0]


def test_same_topology_continues_bit_equal(
    home: tuple[Path, list[tuple[float, float]]], tmp_path: Path
) -> None:
    folder, following = home
    assert (
        run_ranks(4, move, checkpoint_config(HOME, HOME_SCHEDULE), folder, tmp_path, FOLLOWING)[0]
        == following
    )
    same_tensors(folder, tmp_path)


@pytest.mark.parametrize(("topology", "schedule"), ABROAD, ids=lambda value: str(value))
def test_moving_to_another_topology_and_back(
    topology: tuple[int, int, int],
    schedule: str,
    home: tuple[Path, list[tuple[float, float]]],
    tmp_path: Path,
) -> None:
    """Weights, moments and router biases stay as they are; the following losses agree within 1e-6."""
    folder, following = home
    config = checkpoint_config(topology, schedule)
    abroad, num_ranks = tmp_path / "abroad", config.num_processes
    losses = run_ranks(num_ranks, move, config, folder, abroad, FOLLOWING, timeout_seconds=110)[0]
    same_tensors(folder, abroad)
    worst = max(abs(a - b) for (a, _), (b, _) in zip(losses, following, strict=True))
    print(f"{topology} {schedule}: losses within {worst:.1e}")
    assert worst < 1e-6
    run_ranks(4, move, home_config(), abroad, tmp_path / "back", 0, timeout_seconds=110)
    same_tensors(folder, tmp_path / "back")
