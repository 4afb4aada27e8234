"""Oracles: the loss that training itself reported, the model in memory, and the messages a user must see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mhc_dist.config import load_config
from mhc_dist.data.batches import ValidationWindows
from mhc_dist.data.tokens import default_cache_folder, open_tokens
from mhc_dist.export import command as export_command
from mhc_dist.export.huggingface import read_huggingface
from mhc_dist.export.torch_file import write_torch
from mhc_dist.export.weights import StateDictWeights, build_model
from mhc_dist.generate import main as generate_main
from mhc_dist.model.decode import Decoder, generate
from tests.multi_rank.forked_run import run_to_end
from tests.unit.export.models import MHC, export_config, trained_model

MHC_DIST = str(Path(sys.executable).with_name("mhc-dist"))
TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SHORT = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.expert_dim=16",
    "parallel.pipeline=1",
    "schedule.num_microbatches=2",
    "schedule.cluster=null",
    "data.sequence_length=32",
    "train.steps=3",
    "train.validation_batches=1",
    "observe.metrics_port=0",
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [MHC_DIST, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.timeout(300)
def test_an_exported_checkpoint_has_the_loss_that_training_reported(tmp_path: Path) -> None:
    """Oracle: the validation loss of a run on two ranks that share the experts, over the same windows."""
    run_to_end(load_config(TINY, [*SHORT, f"train.output={tmp_path}"]))
    reported = json.loads((tmp_path / "tiny" / "summary.json").read_text())["validation_loss"]
    assert export_command.main([str(tmp_path / "tiny"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    config, state = read_huggingface(tmp_path / "hf")
    of_run = load_config(tmp_path / "tiny" / "config.yaml")
    tokens = open_tokens(of_run.data, default_cache_folder())
    windows = ValidationWindows(tokens.validation, of_run.data.sequence_length, of_run.sequences_per_step)
    inputs, targets = windows.sequences(0, of_run.sequences_per_step)
    loss = build_model(config, state)(torch.from_numpy(inputs), torch.from_numpy(targets))
    assert loss.item() == pytest.approx(reported, rel=1e-5)


def test_generate_says_what_the_model_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bytes that the model in memory generates."""
    config = export_config(MHC)
    model = trained_model(config)
    write_torch(StateDictWeights(model.state_dict()), config, tmp_path / "torch")
    assert export_command.main([str(tmp_path / "torch"), "--to", "hf", "--output", str(tmp_path / "hf")]) == 0
    decoder = Decoder(model, config, capacity=64)
    tokens = list(generate(decoder, [0, *b"def "], 0, 6, 0.0, torch.Generator()))
    expected = bytes([*b"def ", *tokens]).decode(errors="replace") + "\n"
    answered = run("generate", tmp_path / "hf", "def ", "--max-tokens", "6", "--temperature", "0")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == expected
    capsys.readouterr()
    assert generate_main([str(tmp_path / "torch"), "def ", "--max-tokens", "6", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("cut", "code", "shown"), [(KeyboardInterrupt, 130, "def f\n"), (BrokenPipeError, 0, "def f")]
)
def test_an_answer_may_be_cut_short(
    cut: type[BaseException],
    code: int,
    shown: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: what was said until then, and the exit code; no traceback."""

    def generate_a_little(*arguments: object) -> Iterator[int]:
        yield ord("f")
        raise cut

    config = export_config(MHC)
    write_torch(StateDictWeights(trained_model(config).state_dict()), config, tmp_path / "torch")
    monkeypatch.setattr("mhc_dist.generate.generate", generate_a_little)
    monkeypatch.setattr("os.dup2", lambda *_: None)  # this process goes on
    assert generate_main([str(tmp_path / "torch"), "def "]) == code
    assert capfd.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{}/none", "--to", "hf", "--output", "{}/out"), "none does not exist"),
        (("export", "{}", "--to", "hf", "--output", "{}/out"), "holds no committed checkpoint"),
        (("export", "{}", "--to", "hf", "--output", "{}"), "already exists. Remove it"),
        (("export", "{}", "--to", "onnx", "--output", "{}/out"), "invalid choice: 'onnx'"),
        (("generate", "{}/none", "x"), "none does not exist"),
        (("generate", "{}", "x", "--max-tokens", "0"), "--max-tokens 0: at least 1"),
        (("generate", "{}", "x", "--temperature", "-1"), "--temperature -1.0"),
    ],
)
def test_bad_input_is_answered_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """Oracle: exit code 2, the message, nothing written."""
    name, *rest = (argument.replace("{}", str(tmp_path)) for argument in arguments)
    main = export_command.main if name == "export" else generate_main
    try:
        code = main(rest)
    except SystemExit as left:  # argparse has its own way out
        code = int(left.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_refusal_reaches_the_shell(tmp_path: Path) -> None:
    """Oracle: the exit code and stderr of the command itself, without a traceback."""
    done = run("export", tmp_path, "--to", "hf", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("mhc-dist: ")
    assert "Traceback" not in done.stderr
