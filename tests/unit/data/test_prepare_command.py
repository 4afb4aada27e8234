"""`mhc-dist data prepare` as a user calls it."""

import json
from pathlib import Path

from mhc_launcher.commands_data import data_app
from typer.testing import CliRunner


def test_prepare_ends_with_one_json_object(tmp_path: Path) -> None:
    """Oracle: counts known from the files written here; the last line of output parses."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(10):
        (corpus / f"{number}.txt").write_text("x" * 99)
    (corpus / "data.bin").write_bytes(b"\0")
    output = tmp_path / "tokens"
    result = CliRunner().invoke(data_app, ["prepare", str(corpus), "--output", str(output), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["num_train_tokens"] + facts["num_validation_tokens"] == 1000
    assert facts["vocab_size"] == 256
    assert facts["num_skipped"] == 1
    assert "data.bin: not UTF-8 text" in result.stdout
    assert (output / "train.bin").stat().st_size == facts["num_train_tokens"]


def test_a_missing_folder_is_an_error_with_its_name(tmp_path: Path) -> None:
    """Oracle: the ValueError that the command line turns into one message names the folder."""
    missing = tmp_path / "nowhere"
    result = CliRunner().invoke(data_app, ["prepare", str(missing), "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, ValueError)
    assert "nowhere does not exist" in str(result.exception)
