"""The bench of saves on a small model. Oracle: what it must have written and left behind, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhc_dist.bench.checkpoint import BENCH

SMALL = ("model.hidden_size=32", "model.expert_dim=32", "model.num_layers=2", "data.sequence_length=16")


def test_bench_ends_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    arguments = ["--rounds", "2", "--folder", str(tmp_path / "saves"), "--results", str(tmp_path), *settings]
    BENCH.main(arguments)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rounds"] == 2
    assert all(len(values) == 2 for values in figures["seconds"].values())
    pairs = zip(figures["seconds"]["async"], figures["seconds"]["sync"], strict=True)
    first, second = (copied / stopped for copied, stopped in pairs)
    assert figures["async_stop_ratio"] == pytest.approx((first + second) / 2)
    assert figures["checkpoint_bytes"] > 100_000
    assert json.loads((tmp_path / "checkpoint.json").read_text())["figures"] == figures
    assert not (tmp_path / "saves").exists()


def test_an_existing_folder_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit) as ended:
        BENCH.main(["--folder", str(tmp_path / "mine")])
    assert ended.value.code == 2
    assert (tmp_path / "mine").is_dir()
