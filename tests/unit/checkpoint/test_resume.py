"""What may be resumed, by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhc_dist.checkpoint.manifest import CheckpointError, Manifest
from mhc_dist.checkpoint.resume import candidates, changes, check_same_run, is_of_run
from tests.small import small_config
from tests.unit.checkpoint.small_checkpoint import write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (20, 40, 100):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:08d}", step)
    (tmp_path / "run" / "checkpoints" / "step_00000120.tmp").mkdir()
    return tmp_path / "run"


def test_auto_tries_the_newest_first(run: Path, tmp_path: Path) -> None:
    """Oracle: the steps of the committed ones, falling."""
    found = candidates("auto", run)
    assert [int(folder.name[5:]) for folder in found.folders] == [100, 40, 20]
    assert found.fall_back
    assert candidates("auto", tmp_path / "absent").folders == ()


def test_a_step_and_a_path_are_taken_at_their_word(run: Path, tmp_path: Path) -> None:
    """Oracle: the one folder that is meant."""
    folder = run / "checkpoints" / "step_00000040"
    for request in ("40", str(folder)):
        assert candidates(request, run).folders == (folder,)
        assert not candidates(request, run).fall_back
    assert candidates(str(run), tmp_path / "other").folders == (run / "checkpoints" / "step_00000100",)
    assert is_of_run(folder, run)
    assert not is_of_run(folder, tmp_path / "other")


def test_what_is_not_there_is_refused_with_what_is(run: Path) -> None:
    """Oracle: the steps in the message."""
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 60; it has: 20, 40, 100"):
        candidates("60", run)
    with pytest.raises(CheckpointError, match=r"elsewhere does not exist"):
        candidates(str(run / "elsewhere"), run)


def saved(tmp_path: Path, **sections: dict[str, Any]) -> Manifest:
    return write_checkpoint(tmp_path / "saved", config=small_config(**sections).model_dump(mode="json"))


def test_topology_schedule_and_optimizer_may_change(tmp_path: Path) -> None:
    """Oracle: no error, and the list of changes."""
    manifest = saved(tmp_path)
    config = small_config(
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": "zbv", "num_microbatches": 4},
        optim={"peak_learning_rate": 5e-4},
        train={"name": "other", "steps": 9},
        model={"balance_rate": 0.0},
    )
    check_same_run(manifest, config, "fingerprint", tmp_path)
    assert set(changes(manifest, config)) == {
        "model.balance_rate 0.001 -> 0.0",
        "parallel.pipeline 1 -> 2",
        "parallel.data 1 -> 2",
        "parallel.expert 1 -> 2",
        "schedule.name dualpipev -> zbv",
        "schedule.num_microbatches 8 -> 4",
        "optim.peak_learning_rate 0.001 -> 0.0005",
        "train.steps 5 -> 9",
    }


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"hidden_size": 64}}, r"model\.hidden_size=64 \(saved with 32\)"),
        ({"residual": {"num_streams": 2}}, r"residual\.num_streams=2 \(saved with 4\)"),
        ({"residual": {"kind": "hc"}}, r"residual\.kind=hc \(saved with mhc\)"),
        ({"data": {"sequence_length": 24}}, r"data\.sequence_length=24 \(saved with 12\)"),
        ({"data": {"seed": 7}}, r"data\.seed=7 \(saved with 0\)"),
    ],
)
def test_another_model_or_stream_is_refused(sections: Any, named: str, tmp_path: Path) -> None:
    """Oracle: the key with both values."""
    with pytest.raises(CheckpointError, match=named):
        check_same_run(saved(tmp_path), small_config(**sections), "fingerprint", tmp_path)


def test_another_corpus_is_refused(tmp_path: Path) -> None:
    """Oracle: both fingerprints."""
    with pytest.raises(CheckpointError, match=r"fingerprint fingerprint, now changed"):
        check_same_run(saved(tmp_path), small_config(), "changed", tmp_path)
