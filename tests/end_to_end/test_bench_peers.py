"""`mhc-dist bench peers` on a small model. It refuses to time engines that compute different gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_dist.bench.peers.__main__ import BENCH
from tests.multi_rank.test_namespaces import needs_namespaces

MHC_DIST = str(Path(sys.executable).with_name("mhc-dist"))
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.expert_dim=32",
    "data.sequence_length=16",
    "schedule.num_microbatches=3",
)
ENGINES = {
    "ours_recompute_none",
    "ours_recompute_mhc",
    "deepspeed_dualpipev",
    "deepspeed_dualpipev_shared_hidden",
    "torch_dualpipev",
    "torch_dualpipev_shared_hidden",
}


def bench(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = [part for value in SMALL for part in ("--set", value)]
    command = [MHC_DIST, "bench", "peers", "--rounds", "1", "--results", str(folder), *settings, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "link", ["emulated", pytest.param("veth", marks=[needs_namespaces, pytest.mark.needs_root])]
)
def test_peers_bench_ends_with_its_figures(link: str, tmp_path: Path) -> None:
    """Oracle: the file holds what was printed; speedups follow from the times of one round by hand."""
    done = bench(tmp_path, "--link", link, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    seconds = figures["step_seconds"]
    assert seconds.keys() == figures["peak_bytes"].keys() == ENGINES
    assert min(figures["peak_bytes"].values()) > 0
    for peer in ("deepspeed_dualpipev", "torch_dualpipev"):
        ratio = seconds[peer] / seconds["ours_recompute_mhc"]
        assert figures[f"speedup_{peer}"] == pytest.approx(ratio)
    assert figures["gradients_equal"]
    (written,) = tmp_path.iterdir()
    document = json.loads(written.read_text())
    assert document["figures"] == figures
    assert document["label"].startswith({"emulated": "emulated link", "veth": "veth"}[link])


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--set", "parallel.pipeline=2", "--set", "model.num_layers=4"], "pass --compute nominal"),
        (["--set", "parallel.expert=1"], "Set both to 2"),
        (["--set", "schedule.name=zbv"], "Set schedule.name=dualpipev"),
        (["--ratio", "0"], "must be above 0"),
        (["--link", "veth", "--compute", "nominal"], "goes with --compute real"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    options: list[str], remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the remedies written here by hand; nothing is written."""
    with pytest.raises(SystemExit) as ended:
        BENCH.main(["--results", str(tmp_path), *options])
    assert ended.value.code == 2
    assert remedy in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
