"""Oracle: the model in memory, through the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_dist.export.torch_file import write_torch
from mhc_dist.export.weights import StateDictWeights
from mhc_dist.model.decode import Decoder, generate
from tests.unit.export.models import MHC, export_config, trained_model

MHC_DIST = str(Path(sys.executable).with_name("mhc-dist"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [MHC_DIST, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_export_then_generate(tmp_path: Path) -> None:
    """Oracle: the bytes that the model in memory generates with the same seed."""
    config = export_config(MHC)
    model = trained_model(config)
    write_torch(StateDictWeights(model.state_dict()), config, tmp_path / "torch")
    exported = run("export", tmp_path / "torch", "--to", "hf", "--output", tmp_path / "hf")
    assert exported.returncode == 0, exported.stderr
    last = json.loads(exported.stdout.splitlines()[-1])
    assert last["num_bytes"] == sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())

    answered = run(
        "generate", tmp_path / "hf", "def ", "--max-tokens", "6", "--temperature", "0", "--seed", "4"
    )
    assert answered.returncode == 0, answered.stderr
    decoder = Decoder(model, config, capacity=64)
    tokens = list(generate(decoder, [0, *b"def "], 0, 6, 0.0, torch.Generator()))
    assert answered.stdout == bytes([*b"def ", *tokens]).decode(errors="replace") + "\n"


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
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """Oracle: exit code 2, the message, and no traceback."""
    done = run(*(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
