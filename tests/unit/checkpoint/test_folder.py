"""Names in a run's checkpoint folder, and which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_dist.checkpoint import folder as names
from mhc_dist.checkpoint.manifest import MANIFEST_FILE, CheckpointError


def make(checkpoints: Path, *entries: str) -> None:
    for entry in entries:
        (checkpoints / entry).mkdir(parents=True)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (2, 0, [40, 50]),
        (2, 20, [20, 40, 50]),
        (1, 30, [30, 50]),
        (0, 0, [10, 20, 30, 40, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
    ],
)
def test_retention(keep_last: int, keep_every: int, left: list[int]) -> None:
    """Oracle: what is left of steps 10, 20 .. 50, by hand."""
    steps = [30, 10, 50, 20, 40]
    gone = names.to_delete(steps, keep_last, keep_every)
    assert sorted(set(steps) - set(gone)) == left


def test_only_committed_names_count(tmp_path: Path) -> None:
    """Oracle: the list of what each name means, in the module's head."""
    make(tmp_path, "step_00000040", "step_00000020.damaged", "step_00000060.tmp", "step_00000080.superseded")
    make(tmp_path, "step_123456789", "latest", "steps_00000010", "step_10")
    (tmp_path / "step_00000030").write_text("a file")
    assert list(names.committed(tmp_path)) == [40, 123456789]
    assert names.committed(tmp_path / "absent") == {}
    assert names.step_folder(tmp_path, 40) == tmp_path / "step_00000040"


def test_find(tmp_path: Path) -> None:
    """Oracle: the newest one's path; an uncommitted one is refused by name."""
    checkpoints = tmp_path / "run" / names.FOLDER
    make(checkpoints, "step_00000020", "step_00000100", "step_00000120.tmp")
    for step in ("step_00000020", "step_00000100", "step_00000120.tmp"):
        (checkpoints / step / MANIFEST_FILE).touch()
    names.point_latest(checkpoints, checkpoints / "step_00000100")
    newest = checkpoints / "step_00000100"
    assert names.find(tmp_path / "run") == names.find(checkpoints) == names.find(newest) == newest
    assert names.find(checkpoints / "latest") == newest
    assert names.find(checkpoints / "step_00000020") == checkpoints / "step_00000020"
    with pytest.raises(CheckpointError, match=r"step_00000120\.tmp was never committed"):
        names.find(checkpoints / "step_00000120.tmp")


def test_what_is_no_checkpoint_is_told_with_what_is_there(tmp_path: Path) -> None:
    """Oracle: what this test has put there."""
    checkpoints = tmp_path / "run" / names.FOLDER
    make(checkpoints, "step_00000020", "step_00000100")
    make(tmp_path / "dead" / names.FOLDER, "step_00000003.tmp", "step_00000002.damaged")
    (tmp_path / "notes.md").touch()
    for path, words in {
        tmp_path: "holds no committed checkpoint and is none",
        tmp_path / "rum": "rum does not exist. Name a run's folder",
        checkpoints / "step_00000021": "21 does not exist; .*/run/checkpoints has the steps 20, 100",
        tmp_path / "notes.md": "notes.md is a file, and a checkpoint is a folder",
        tmp_path / "dead": r"checkpoint: step_00000002\.damaged, step_00000003\.tmp never became",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            names.find(path)


def test_latest_is_moved_in_one_step(tmp_path: Path) -> None:
    """Oracle: the link after each move; nothing else is left beside it."""
    make(tmp_path, "step_00000001", "step_00000002")
    for step in (1, 2):
        names.point_latest(tmp_path, names.step_folder(tmp_path, step))
        assert (tmp_path / names.LATEST).readlink() == Path(f"step_{step:08d}")
    assert len(list(tmp_path.iterdir())) == 3


def test_set_aside_never_overwrites(tmp_path: Path) -> None:
    """Oracle: marks left in each folder."""
    for mark in ("first", "second", "third"):
        make(tmp_path, "step_00000007")
        (tmp_path / "step_00000007" / mark).touch()
        names.set_aside(tmp_path / "step_00000007", names.DAMAGED)
    found = {path.name: [mark.name for mark in path.iterdir()] for path in sorted(tmp_path.iterdir())}
    assert found == {
        "step_00000007.damaged": ["first"],
        "step_00000007.damaged-2": ["second"],
        "step_00000007.damaged-3": ["third"],
    }


def test_retired_checkpoint_is_gone(tmp_path: Path) -> None:
    """Oracle: the file system."""
    make(tmp_path, "step_00000001", "step_00000002")
    names.retire(tmp_path / "step_00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
