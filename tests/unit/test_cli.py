from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mhc_launcher.cli import main

from mhc_dist.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = str(CONFIGS / "tiny.yaml")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `mhc-dist ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["mhc-dist", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_config_prints_what_loads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Oracle: loading the printed text gives the config that the overrides describe."""
    assert run(monkeypatch, "config", TINY, "--set", "train.steps=7", "--set", "data.seed=3") == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(TINY, ["train.steps=7", "data.seed=3"])


def test_params_ends_with_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the paper's 27B counts, and a table whose components add up to the total."""
    assert run(monkeypatch, "params", str(CONFIGS / "paper_27b.yaml"), "--json") == 0
    *table, last = capsys.readouterr().out.splitlines()
    counts = json.loads(last)
    assert {name: f"{count / 1e9:.2f}" for name, count in counts.items()} == {
        "total": "27.05",
        "active": "4.14",
        "vocab": "0.66",
    }
    numbers = [int(line[20:37].replace(",", "")) for line in table if not line.startswith("-")]
    assert sum(numbers[:-3]) == numbers[-3] == counts["total"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "absent.yaml"], ["absent.yaml", "no such file"]),
        (["config", TINY, "--set", "train.stepz=3"], ["train.stepz", "Did you mean train.steps?"]),
        (["params", TINY, "--set", "parallel.expert=3"], ["parallel.expert=3", "parallel.data=2"]),
        (["schedule", "dualpipe9"], ["dualpipe9", "dualpipev", "1f1b"]),
        (["schedule", "dualpipev", "--ranks", "4", "--microbatches", "3"], ["num_microbatches=3", "8"]),
        (["train", TINY, "--set", "model.num_layers=2"], ["model.num_layers=2", "4 chunks"]),
        (["train", TINY, "--set", "data.corpus=/absent/folder"], ["/absent/folder", "does not exist"]),
        (["train", TINY, "--set", "model.vocab_size=100"], ["model.vocab_size=100", "256"]),
        (["train", TINY, "--set", "train.backend=nccl"], ["4 processes", "train.backend=gloo"]),
        (["train", TINY, "--master-port", "70000"], ["70000"]),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Oracle: the words that name each mistake and its remedy; nothing on stdout, no run folder."""
    if arguments[0] == "train":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        arguments = [
            *arguments,
            "--set",
            f"train.output={tmp_path / 'runs'}",
            "--set",
            "observe.metrics_port=0",
        ]
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mhc-dist: ")
    assert "Traceback" not in captured.err
    assert [word for word in words if word not in captured.err] == [], captured.err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_empty_corpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Oracle: a folder made empty on purpose, named in the message."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    overrides = [f"data.corpus={corpus}", f"train.output={tmp_path / 'runs'}"]
    arguments = [argument for override in overrides for argument in ("--set", override)]
    assert run(monkeypatch, "train", TINY, *arguments) == 2
    assert str(corpus) in capsys.readouterr().err


@pytest.mark.parametrize("use", ["metrics", "master"])
def test_occupied_ports_are_refused(
    use: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Oracle: a port this test itself listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        # The third process would export on the taken port.
        asked = (
            ["--set", f"observe.metrics_port={port - 2}"]
            if use == "metrics"
            else ["--set", "observe.metrics_port=0", "--master-port", str(port)]
        )
        assert run(monkeypatch, "train", TINY, "--set", f"train.output={tmp_path}", *asked) == 2
    error = capsys.readouterr().err
    assert f"{port} is in use" in error
    assert "another" in error


def test_commands_without_training_need_no_torch() -> None:
    """Oracle: the modules of a fresh interpreter that has run them."""
    code = f"""
import contextlib, io, sys
from mhc_launcher.cli import app
for arguments in (["config", {TINY!r}], ["params", {TINY!r}, "--json"], ["schedule", "zbv"], ["--help"]):
    with contextlib.redirect_stdout(io.StringIO()):
        app(arguments, standalone_mode=False)
sys.exit(", ".join({{"torch", "numpy", "deepspeed"}} & set(sys.modules)) or 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (0, "")
