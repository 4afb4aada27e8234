"""`mhc-dist preflight` as users start it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_runs import ENVIRON, MHC_DIST, ROOT, need
from hosts import Hosts

from mhc_dist.plan.cluster import load_cluster

BIN = Path(sys.executable).parent
STARTS = {
    "mpirun": [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "4"],
    "torchrun": [str(BIN / "torchrun"), "--no-python", "--nproc-per-node", "4"],
}


@pytest.mark.parametrize("start", STARTS)
def test_four_ranks_are_surveyed_within_a_minute(start: str, tmp_path: Path) -> None:
    """Oracle: the clock; the planner, which reads the cluster file that was written."""
    output = tmp_path / "cluster.yaml"
    began = time.monotonic()
    done = subprocess.run(
        [*STARTS[start], MHC_DIST, "preflight", "--output", str(output), "--folder", str(tmp_path)],
        env=os.environ | ENVIRON | {"COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    # mpirun gives its ranks a terminal, so they write in colour.
    out = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    print(f"preflight of 4 ranks under {start}: {seconds:.1f} s, of which its own: {own_seconds(out)} s")
    # What the processes need to start on a busy machine is not the survey's.
    assert own_seconds(out) < 60
    for words in ("4 ranks on 1 nodes", "0 - 1", "2 - 3", "all-to-all", "GFLOP/s", "clock", "versions"):
        assert words in out, out
    found = load_cluster(str(output))
    assert (found.devices_per_node, found.num_nodes) == (4, 1)
    # A plan of the tiny run on this cluster.
    plan = [MHC_DIST, "plan", str(ROOT / "configs" / "tiny.yaml"), "--cluster", str(output), "--json"]
    planned = subprocess.run(plan, capture_output=True, text=True, timeout=300, check=False)
    assert planned.returncode == 0, planned.stderr


def own_seconds(out: str) -> float:
    return float(out.split(" warnings, ")[1].split()[0])


@pytest.mark.needs_root
def test_nodes_are_told_apart_over_torchrun(tmp_path: Path) -> None:
    """Oracle: two hosts of two ranks each; four of the six pairs cross from one to the other."""
    need("ip", "unshare")
    with Hosts(2) as hosts:
        arguments = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", hosts[0].address]
        started = [
            hosts[number].start(
                [
                    *(str(BIN / "torchrun"), "--no-python", *arguments, "--node-rank", str(number)),
                    *("--master-port", "29531", MHC_DIST, "preflight", "--folder", str(tmp_path)),
                ],
                ENVIRON,
            )
            for number in range(2)
        ]
        answers = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0, 0], answers
        out = answers[0][0]
        assert "4 ranks on 2 nodes" in out
        assert out.count("between nodes") == 4
        assert out.count("inside a node") == 2
