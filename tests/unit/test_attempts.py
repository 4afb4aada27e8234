"""Which ends of a run are answered by another start, and from where."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from mhc_launcher import run_folder
from mhc_launcher.attempts import Restarts, run_attempts
from mhc_launcher.children import Ended

from mhc_dist.checkpoint.manifest import CheckpointError
from mhc_dist.config import RunConfig, load_config
from mhc_dist.guard.exit_codes import ExitCode
from tests.unit.checkpoint.small_checkpoint import write_checkpoint

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr("mhc_launcher.attempts.PAUSE_SECONDS", 0.0)
    return load_config(TINY, [f"train.output={tmp_path}"])


def attempts(config: RunConfig, restarts: Restarts, ends: list[Ended]) -> tuple[int, list[list[str]]]:
    """Starts that end as given, one after the other; the exit code and what each start was told."""
    told: list[list[str]] = []
    left = iter(ends)

    def start(arguments: list[str]) -> Ended:
        told.append(arguments)
        return next(left)

    return run_attempts(config, restarts, start, lambda ended: ended.exit_code), told


@pytest.mark.parametrize("code", [1, 81, 82, 137, 139])
def test_crashes_are_followed_by_restarts(code: int, config: RunConfig) -> None:
    """Oracle: what each start is told, by hand."""
    ends = [Ended(code, None), Ended(code, None), Ended(0, None)]
    assert attempts(config, Restarts("40", 3), ends) == (
        0,
        [
            ["--resume", "40"],
            ["--resume", "auto", "--restarts", "1"],
            ["--resume", "auto", "--restarts", "2"],
        ],
    )


def test_restarts_are_bounded(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: two starts more than the first; the message names each and where it begins."""
    write_checkpoint(config.folder / "checkpoints" / "step_00000040", 40)
    code, told = attempts(config, Restarts(None, 2), [Ended(81, None)] * 3)
    assert code == 81
    assert [len(arguments) for arguments in told] == [0, 4, 4]
    assert capsys.readouterr().err.splitlines() == [
        "mhc-dist: restart 1 of 2 of run tiny from step 40.",
        "mhc-dist: restart 2 of 2 of run tiny from step 40.",
    ]


@pytest.mark.parametrize(
    "end",
    [
        Ended(0, None),
        Ended(ExitCode.USAGE, None),
        Ended(ExitCode.STOPPED, None),
        Ended(ExitCode.PREEMPTED, None),
        Ended(ExitCode.DIVERGED, None),
        Ended(ExitCode.UNSAVED, None),
        Ended(137, signal.SIGINT),
    ],
    ids=lambda end: str(end.exit_code),
)
def test_no_restart_after(end: Ended, config: RunConfig) -> None:
    """Oracle: ends that a restart would only repeat, or that somebody asked for: one start."""
    assert attempts(config, Restarts(None, 5), [end]) == (end.exit_code, [[]])


def test_the_next_crash_has_its_own_cause(config: RunConfig) -> None:
    """Oracle: the file in which a rank says why; later ranks do not overwrite it."""
    run_folder.prepare(config)
    path = config.folder / run_folder.FAILURE_FILE

    def start(_: list[str]) -> Ended:
        assert not path.exists()
        path.write_text(json.dumps({"rank": 1, "exit_code": 1, "message": "first"}))
        return Ended(1, None)

    assert run_attempts(config, Restarts(None, 1), start, lambda ended: ended.exit_code) == 1


def test_a_resumed_run_keeps_its_folder(config: RunConfig) -> None:
    """Oracle: marks in the folder; ends of earlier starts are gone, a config that differs is kept."""
    run_folder.prepare(config)
    write_checkpoint(config.folder / "checkpoints" / "step_00000040", 40)
    for name in (run_folder.SUMMARY_FILE, run_folder.FAILURE_FILE, "metrics.jsonl"):
        (config.folder / name).write_text("{}")
    longer = load_config(TINY, [f"train.output={config.train.output}", "train.steps=300"])
    for request in ("auto", "40", str(config.folder / "checkpoints" / "step_00000040")):
        assert run_folder.prepare(longer, request) is None
    assert sorted(path.name for path in config.folder.iterdir()) == [
        "checkpoints",
        "config.1.yaml",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert load_config(config.folder / "config.yaml") == longer
    assert load_config(config.folder / "config.1.yaml") == config


def test_another_runs_checkpoint_starts_a_new_folder(config: RunConfig, tmp_path: Path) -> None:
    """Oracle: an earlier run of that name is kept aside as usual."""
    run_folder.prepare(config)
    write_checkpoint(tmp_path / "other" / "checkpoints" / "step_00000040", 40)
    assert run_folder.prepare(config, str(tmp_path / "other")) == tmp_path / "tiny.1"


def test_what_cannot_be_resumed_is_refused_before_anything_is_touched(config: RunConfig) -> None:
    """Oracle: the steps that are there, and the folder as it was."""
    run_folder.prepare(config)
    write_checkpoint(config.folder / "checkpoints" / "step_00000040", 40)
    with pytest.raises(CheckpointError, match=r"no committed checkpoint of step 50; it has: 40"):
        run_folder.prepare(config, "50")
    assert (config.folder / "checkpoints" / "step_00000040").is_dir()


def test_auto_without_a_folder_begins_a_run(config: RunConfig) -> None:
    """Oracle: the folder with its config: the same command may be repeated from the start."""
    assert run_folder.prepare(config, "auto") is None
    assert load_config(config.folder / "config.yaml") == config


def test_a_finished_run_has_nothing_to_resume(config: RunConfig) -> None:
    """Oracle: the summary of the last step; with more steps to make there is."""
    run_folder.prepare(config)
    (config.folder / run_folder.SUMMARY_FILE).write_text(json.dumps({"steps": config.train.steps}))
    assert run_folder.finished(config) == {"steps": config.train.steps}
    longer = load_config(TINY, [f"train.output={config.train.output}", "train.steps=300"])
    assert run_folder.finished(longer) is None
