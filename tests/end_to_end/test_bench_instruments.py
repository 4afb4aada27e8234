"""The bench of what watching costs, on a small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MHC_DIST = str(Path(sys.executable).with_name("mhc-dist"))


@pytest.mark.timeout(240)
def test_it_ends_with_its_figures(tmp_path: Path) -> None:
    """Oracle: the keys a reader is promised; the cost itself depends on the size of a step, which is tiny."""
    command = [MHC_DIST, "bench", "instruments", "--rounds", "2", "--steps", "2", "--results", str(tmp_path)]
    command += [
        "--set",
        "model.hidden_size=32",
        "--set",
        "data.sequence_length=32",
        "--set",
        "observe.stability_every=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["cost_parts"]) == {"sampling", "figures", "metrics_and_logs", "scrapes"}
    assert all(share > 0 for share in figures["cost_parts"].values())
    assert figures["cost_ratio"] == pytest.approx(sum(figures["cost_parts"].values()))
    assert (figures["rounds"], figures["steps_per_block"], figures["stability_every"]) == (2, 2, 2)
    assert json.loads((tmp_path / "instruments.json").read_text())["figures"] == figures
