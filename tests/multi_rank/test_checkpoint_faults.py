"""What a broken disk does: named, nothing half-written left as committed, and the run goes on where it can.

Oracle: the tensors of a checkpoint that was saved without trouble, and the names a user needs.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mhc_dist.checkpoint import disk
from mhc_dist.checkpoint.folder import committed
from mhc_dist.checkpoint.load import choose, tidy
from mhc_dist.checkpoint.manifest import CheckpointError
from mhc_dist.config import RunConfig
from tests.multi_rank.checkpoint_case import build_rank, checkpoint_config
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.test_checkpoint import same_tensors

PLACE = (1, 2, 2)


def break_disk(code: int, after_bytes: int) -> None:
    """From now on, writing fails in this process after so many bytes of a file, as the kernel reports it."""
    real, written = os.write, {}

    def write(descriptor: int, block: Any) -> int:
        done = written.get(descriptor, 0)
        if done + len(block) > after_bytes:
            raise OSError(code, os.strerror(code))
        written[descriptor] = done + len(block)
        return real(descriptor, block)

    disk.os = type("os", (), {**vars(os), "write": staticmethod(write)})  # type: ignore[attr-defined]


def repair_disk() -> None:
    disk.os = os  # type: ignore[attr-defined]


def save_with_trouble(rank: int, config: RunConfig, folder: Path, code: int, broken: int) -> list[str | None]:
    """One save before, two during, one after the trouble on rank `broken`; what each said."""
    this = build_rank(rank, config)
    saver = this.saver(folder)
    said = []
    this.train(0, 1)
    said.append(saver.save(this.progress(1), 0.0).failure)
    this.train(1, 1)
    if rank == broken:
        break_disk(code, after_bytes=5000)
    said.append(saver.save(this.progress(2), 0.0).failure)
    saver.begin(this.progress(2), 0.0)
    this.train(2, 1)  # goes on meanwhile
    outcome = saver.wait()
    assert outcome is not None
    said.append(outcome.failure)
    repair_disk()
    said.append(saver.save(this.progress(3), 0.0).failure)
    return said


@pytest.mark.parametrize("broken", [0, 1])
def test_full_disk(broken: int, tmp_path: Path) -> None:
    config = checkpoint_config(PLACE)
    for said in run_ranks(2, save_with_trouble, config, tmp_path, errno.ENOSPC, broken):
        assert said[0] is None
        for sentence in said[1:3]:
            assert sentence is not None
            for word in (f"rank {broken}", "No space left on device", f"rank_{broken:05d}.safetensors"):
                assert word in sentence, sentence
        assert said[3] is None
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000001", "step_00000003"]


def test_read_only_folder(tmp_path: Path) -> None:
    def save(rank: int, folder: Path) -> list[str | None]:
        this = build_rank(rank, checkpoint_config(PLACE))
        real = os.mkdir

        def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
            if "checkpoints" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            real(path, *arguments, **options)

        os.mkdir = mkdir  # type: ignore[assignment]
        first = this.save(folder, 1)
        os.mkdir = real
        return [first.failure, this.save(folder, 1).failure]

    for refused, repaired in run_ranks(2, save, tmp_path):
        assert refused is not None
        assert "Read-only file system" in refused
        assert str(tmp_path) in refused
        assert repaired is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB; what cannot mount one has the injected faults above."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_and_then_read_only(small_disk: Path) -> None:
    def save(rank: int) -> tuple[str | None, str | None]:
        this = build_rank(rank, checkpoint_config((1, 1, 1)))
        full = this.save(small_disk, 1).failure
        subprocess.run(["mount", "-o", "remount,ro,size=10m", str(small_disk)], check=True)
        return full, this.save(small_disk, 1).failure

    ((full, read_only),) = run_ranks(1, save)
    assert full is not None
    assert "No space left on device" in full
    assert "rank_00000.safetensors" in full
    assert read_only is not None
    assert "Read-only file system" in read_only
    assert committed(small_disk / "checkpoints") == {}


def save_three(rank: int, config: RunConfig, folder: Path) -> None:
    this = build_rank(rank, config)
    for step in (1, 2, 3):
        this.train(step - 1, 1)
        assert this.save(folder, step).failure is None


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Committed checkpoints of steps 1, 2 and 3; keep_last must not be in the way."""
    folder = tmp_path_factory.mktemp("three")
    run_ranks(2, save_three, checkpoint_config(PLACE, checkpoint={"keep_last": 0}), folder)
    return folder


def truncate(folder: Path) -> str:
    path = folder / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} is truncated"


def flip(folder: Path) -> str:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path} is damaged"


def lose(folder: Path) -> str:
    path = folder / "rank_00001.safetensors"
    path.unlink()
    return f"{path} is missing"


def flip_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_updates": 3', '"num_updates": 2'))
    return f"{path} is damaged"


@pytest.mark.parametrize("harm", [truncate, flip, lose, flip_manifest])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(
    harm: Any, three: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(three, run, symlinks=True)
    sentence = harm(run / "checkpoints" / "step_00000003")
    (run / "checkpoints" / "step_00000004.tmp").mkdir()

    def load(rank: int) -> tuple[int, list[str], list[str]]:
        this = build_rank(rank, checkpoint_config(PLACE))
        chosen = choose("auto", run, this.group)
        assert chosen is not None
        with pytest.raises(CheckpointError, match=r"step_00000003"):
            choose("3", run, this.group)
        step = this.load(run)
        told = tidy(run, step, tuple(folder for folder, _ in chosen.passed_over)) if rank == 0 else []
        # What was loaded is what was saved: write it again and compare the files' tensors.
        assert this.save(tmp_path / "again", step).failure is None
        return step, [why for _, why in chosen.passed_over], told

    for rank, (step, passed_over, told) in enumerate(run_ranks(2, load)):
        assert step == 2
        assert len(passed_over) == 1
        assert passed_over[0].startswith(sentence)
        if rank == 0:
            assert any("step_00000004.tmp was never committed" in line for line in told)
    same_tensors(three / "checkpoints" / "step_00000002", tmp_path / "again")
    assert sorted(committed(run / "checkpoints")) == [1, 2]
    assert (run / "checkpoints" / "step_00000003.damaged").is_dir()


def test_nothing_that_is_whole(three: Path, tmp_path: Path) -> None:
    """Every checkpoint is damaged: named, all of them, and nothing is renamed."""
    run = tmp_path / "run"
    shutil.copytree(three, run, symlinks=True)
    for folder in committed(run / "checkpoints").values():
        lose(folder)

    def load(rank: int) -> None:
        this = build_rank(rank, checkpoint_config(PLACE))
        with pytest.raises(CheckpointError, match=r"step_00000003.*step_00000002.*step_00000001"):
            choose("auto", run, this.group)

    run_ranks(2, load)
    assert len(committed(run / "checkpoints")) == 3


def test_what_is_saved_meanwhile_is_the_state_of_its_step(three: Path, tmp_path: Path) -> None:
    """Oracle: the same step saved while training waited."""

    def save(rank: int) -> None:
        this = build_rank(rank, checkpoint_config(PLACE))
        saver = this.saver(tmp_path)
        this.train(0, 2)
        saver.begin(this.progress(2), 0.0)
        this.train(2, 3)
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.failure is None
        assert outcome.step == 2

    run_ranks(2, save)
    same_tensors(three / "checkpoints" / "step_00000002", tmp_path)
