"""A checkpoint says what is wrong with it, and is read back as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mhc_launcher.cli import app
from typer.testing import CliRunner

from mhc_dist.checkpoint.manifest import (
    CheckpointError,
    Fragment,
    Section,
    StoredTensor,
    read_index,
    read_manifest,
)
from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.checkpoint.verify import all_damages
from tests.small import small_config
from tests.unit.checkpoint.small_checkpoint import VALUES, WEIGHT, write_checkpoint

FILES = ("manifest.json", "index.json", "rank_00000.safetensors", "rank_00001.safetensors")


def test_written_and_read_back(tmp_path: Path) -> None:
    """Oracle: what was written, by equality."""
    manifest = write_checkpoint(tmp_path / "c")
    assert read_manifest(tmp_path / "c") == manifest
    assert all_damages(tmp_path / "c") == []
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.names() == [WEIGHT]
    assert checkpoint.names(Section.BUFFER) == []
    assert checkpoint.shape(WEIGHT) == (2, 3)
    assert torch.equal(checkpoint.load_tensor(WEIGHT), torch.tensor(VALUES).view(2, 3))


@pytest.mark.parametrize("name", FILES)
def test_every_single_byte_is_guarded(name: str, tmp_path: Path) -> None:
    """Oracle: each file with one byte flipped, at every place; the file is named."""
    write_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    missed = []
    # The manifest's last byte is the end of its last line: JSON is the same without it.
    for place in range(len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        if not any(name in sentence for sentence in all_damages(tmp_path / "c")):
            missed.append((place, whole[place : place + 1]))
    # Space between JSON tokens may change into other space without changing what the manifest says.
    assert all(name == "manifest.json" and byte.isspace() for _, byte in missed), missed
    path.write_bytes(whole)
    assert all_damages(tmp_path / "c") == []


@pytest.mark.parametrize("name", FILES)
def test_missing_truncated_and_longer_files(name: str, tmp_path: Path) -> None:
    """Oracle: the words that say which file and what is wrong with it."""
    write_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / name
    whole = path.read_bytes()
    path.unlink()
    (sentence,) = all_damages(tmp_path / "c")
    assert name in sentence
    assert "missing" in sentence or "does not exist" in sentence
    path.write_bytes(whole[: len(whole) // 2])
    assert any(
        name in line and ("truncated" in line or "damaged" in line) for line in all_damages(tmp_path / "c")
    )
    if name != "manifest.json":
        path.write_bytes(whole + b"\0")
        assert "too long" in all_damages(tmp_path / "c")[0]


def test_reading_refuses_a_damaged_one(tmp_path: Path) -> None:
    """Oracle: the file's name in the error."""
    write_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "rank_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is missing"):
        Checkpoint.open(tmp_path / "c")


def test_a_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    """Oracle: a section that this version does not know."""
    config = {**small_config().model_dump(mode="json"), "warp": {"speed": 9}}
    write_checkpoint(tmp_path / "c", config=config)
    checkpoint = Checkpoint.open(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"c was saved by mhc-dist \?.*: warp: .* Use the version"):
        _ = checkpoint.config


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    """Oracle: both formats in the message."""
    write_checkpoint(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    content = json.loads(path.read_text()) | {"format": "mhc_dist checkpoint, version 9"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"version 9.*version 1"):
        read_manifest(tmp_path / "c")


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ([(0, 4), (4, 6)], None),
        ([(0, 4), (5, 6)], "elements 4 to 4"),
        ([(0, 4), (3, 6)], "elements 3 to 3"),
        ([(0, 5)], "elements from 5 on"),
        ([], "elements from 0 on"),
    ],
)
def test_gaps_and_overlaps(parts: list[tuple[int, int]], missing: str | None) -> None:
    """Oracle: fragments of six elements, by hand."""
    fragments = tuple(Fragment("f", start, stop, 0) for start, stop in parts)
    assert StoredTensor(dtype="F32", shape=(2, 3), fragments=fragments).gap() == missing


def test_index_names_are_sorted_by_section(tmp_path: Path) -> None:
    """Oracle: the one weight, and nothing where nothing was saved."""
    write_checkpoint(tmp_path / "c")
    assert read_index(tmp_path / "c").names(Section.WEIGHT) == [WEIGHT]
    assert read_index(tmp_path / "c").names(Section.FIRST_MOMENT) == []


def test_inspect_shows_and_verifies(tmp_path: Path) -> None:
    """Oracle: the facts of the checkpoint written by hand; exit code 1 once a byte is wrong."""
    checkpoints = tmp_path / "run" / "checkpoints"
    manifest = write_checkpoint(checkpoints / "step_00000020")
    (checkpoints / "step_00000010.damaged").mkdir()
    (checkpoints / "step_00000030.tmp").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert result.exit_code == 0
    for words in (
        "20 of 40, 19 updates applied",
        "1,920; next sequence 160",
        "pipeline 1 x data 2, experts over 1; 1f1b",
        "1 tensors, 6 elements, 24 bytes",
        "step_00000030.tmp: never committed",
        "step_00000010.damaged: set aside as damaged",
    ):
        assert words in result.output, words
    assert result.output.count("verified") == 3
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(checkpoints), "--json"]).output)
    assert (facts["step"], facts["num_tokens"], facts["damages"]) == (20, 1920, [])
    assert facts["topology"] == {"pipeline": 1, "data": 2, "expert": 1}
    assert {name: file["sha256"] for name, file in facts["files"].items()} == {
        name: file.sha256 for name, file in manifest.files.items()
    }
    (checkpoints / "step_00000020" / "rank_00001.safetensors").write_bytes(bytes(8))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "DAMAGED" in result.output
    assert "rank_00001.safetensors is damaged" in result.output
    assert "verified" not in result.output
