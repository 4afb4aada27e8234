from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mhc_launcher import devices, run_folder
from mhc_launcher.children import Ended, run_group
from mhc_launcher.local import environment, report

from mhc_dist.config import RunConfig, load_config

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    made = load_config(TINY, [f"train.output={tmp_path}"])
    run_folder.prepare(made)
    return made


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (Ended(81, None), 81, "exit code 81 (PEER_DIED)"),
        (Ended(7, None), 7, "exit code 7"),
        (Ended(0, None), 1, "left no summary"),
        (Ended(247, None), 137, "killed by SIGKILL"),  # how the deepspeed launcher tells of a killed rank
        (Ended(139, None), 139, "killed by SIGSEGV"),  # the launcher itself
        (Ended(83, signal.SIGTERM), 83, "stopped by SIGTERM"),
        (Ended(0, signal.SIGINT), 130, "stopped by SIGINT"),
    ],
)
def test_an_end_without_summary_is_told_in_one_line(
    ended: Ended, code: int, words: str, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the exit codes of shells and of guard/exit_codes.py, listed beside each end."""
    assert report(config, ended) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_what_the_first_rank_to_fail_said_is_told(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the file as mhc_dist/train.py writes it; the launcher may have seen a victim's code first."""
    said = {"rank": 3, "exit_code": 2, "message": "data.corpus changed under us. Start again."}
    (config.folder / run_folder.FAILURE_FILE).write_text(json.dumps(said))
    assert report(config, Ended(81, None)) == 2
    assert capsys.readouterr().err == (
        "mhc-dist: run tiny failed on rank 3: data.corpus changed under us. Start again.\n"
    )


def test_the_summary_decides_about_success(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: a summary as rank 0 writes it; a crash after it is told but changes nothing."""
    (config.folder / run_folder.SUMMARY_FILE).write_text('{"steps": 3}')
    assert report(config, Ended(134, None)) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"steps": 3}
    assert "134" in captured.err


def test_a_second_run_of_the_same_name_is_refused(config: RunConfig) -> None:
    """Oracle: the lock is free again after the first run."""
    with (
        run_folder.reserved(config),
        pytest.raises(ValueError, match=r"another run is writing to .*train\.name"),
        run_folder.reserved(config),
    ):
        pass
    with run_folder.reserved(config):
        pass


def test_earlier_runs_are_kept_under_the_next_free_name(config: RunConfig) -> None:
    """Oracle: marks left in each run's folder."""
    (config.folder / "mark").write_text("first")
    assert run_folder.prepare(config) == config.train.output / "tiny.1"
    (config.folder / "mark").write_text("second")
    assert run_folder.prepare(config) == config.train.output / "tiny.2"
    marks = [(config.train.output / name / "mark").read_text() for name in ("tiny.1", "tiny.2")]
    assert marks == ["first", "second"]
    assert load_config(config.folder / run_folder.CONFIG_FILE) == config


def test_users_settings_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the variables a user had set before."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "16")
    on_cpu, on_gpu = environment(2, []), environment(2, ["2", "3"])
    assert {on_cpu["OMP_NUM_THREADS"], on_gpu["OMP_NUM_THREADS"]} == {"3"}
    assert {on_cpu["GLOO_SOCKET_IFNAME"], on_gpu["GLOO_SOCKET_IFNAME"]} == {"eth7"}
    assert {on_cpu["TORCH_CPP_LOG_LEVEL"], on_gpu["TORCH_CPP_LOG_LEVEL"]} == {"INFO"}
    assert (on_cpu["DS_ACCELERATOR"], on_cpu["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    assert "CUDA_VISIBLE_DEVICES" not in on_gpu
    assert (on_gpu["CUDA_DEVICE_MAX_CONNECTIONS"], on_gpu["CUDA_MODULE_LOADING"]) == ("16", "EAGER")
    assert "CUDA_MODULE_LOADING" not in on_cpu


@pytest.mark.parametrize(
    ("present", "chosen", "visible"),
    [
        (4, None, ["0", "1", "2", "3"]),
        (4, "2,3", ["2", "3"]),
        (4, "1,-1,2", ["1"]),
        (4, "", []),
        (0, "0,1", []),
    ],
)
def test_visible_gpus(
    present: int, chosen: str | None, visible: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the CUDA programming guide's rules for CUDA_VISIBLE_DEVICES."""
    nodes = [Path(f"/dev/nvidia{index}") for index in range(present)] + [Path("/dev/nvidiactl")]
    monkeypatch.setattr(devices.Path, "glob", lambda _self, _pattern: iter(nodes))
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert devices.visible_gpus() == visible


def test_gpus_for_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one GPU a process, none where the run asks for gloo or there are none."""
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["0", "1"])
    assert devices.gpus_for_run("auto", 2) == ["0", "1"]
    assert devices.gpus_for_run("nccl", 1) == ["0"]
    assert devices.gpus_for_run("gloo", 4) == []
    with pytest.raises(ValueError, match=r"4 processes need a GPU each, 2 are visible"):
        devices.gpus_for_run("auto", 4)
    monkeypatch.setattr(devices, "visible_gpus", list)
    assert devices.gpus_for_run("auto", 4) == []


def test_descendants_that_outlive_the_command_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the process table; the grandchild would sleep for a minute."""
    monkeypatch.setattr("mhc_launcher.children.LINGER_SECONDS", 0.3)
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib;"
        " child = subprocess.Popen(['sleep', '60']);"
        f" pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); sys.exit(5)"
    )
    ended = run_group([sys.executable, "-c", code], dict(os.environ), lambda _: False)
    assert ended == Ended(5, None)
    assert ends_soon(int(pid_file.read_text()))


def ends_soon(pid: int) -> bool:
    """Whether a process is gone, or dead and not yet collected, within a few seconds."""
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_insisting_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    """Oracle: the exit code of SIGKILL, long before the command's own minute is over."""
    deaf = "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    deaf += f" pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    code = f"""
import os, sys
from mhc_launcher.children import run_group
print(run_group([sys.executable, "-c", {deaf!r}], dict(os.environ), lambda _: False))
"""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < began + 30
        time.sleep(0.05)
    process.terminate()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert "exit_code=137" in out
    assert "SIGTERM" in out
