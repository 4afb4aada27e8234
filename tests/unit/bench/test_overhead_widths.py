"""The overhead bench's sizes. Oracle: Table 5 of the paper, and proportions worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhc_dist.bench import overhead
from mhc_dist.config import RunConfig


@pytest.mark.parametrize(
    ("asked", "widths"),
    [
        ([], (1280, 896, 16, 512)),
        (["model.hidden_size=640"], (640, 448, 8, 256)),
        (["model.hidden_size=640", "model.expert_dim=100"], (640, 100, 8, 256)),
    ],
)
def test_widths_follow_the_hidden_size(
    asked: list[str], widths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: as above; what is asked for by name stays, and the file is named by the width."""
    seen: list[RunConfig] = []

    def run(config: RunConfig, backends: list[str], rounds: int) -> dict[str, object]:
        seen.append(config)
        return {
            "backend": "cpu", "overhead_ratio": 0.0, "overhead_interval": [0.0, 0.0],
            "overhead_ratio_of_wall_time": 0.0, "breakdown": {},
        }  # fmt: skip

    monkeypatch.setattr(overhead, "run", run)
    arguments = [part for value in asked for part in ("--set", value)]
    overhead.BENCH.main([*arguments, "--results", str(tmp_path)])
    model = seen[0].model
    assert (model.hidden_size, model.expert_dim, model.num_heads, model.kv_rank) == widths
    written = json.loads((tmp_path / f"overhead_{widths[0]}.json").read_text())
    assert written["figures"]["backend"] == "cpu"
