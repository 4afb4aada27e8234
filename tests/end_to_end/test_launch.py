from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
START = """
import sys
from mhc_dist.config import load_config
from mhc_launcher.local import train_here
sys.exit(train_here(load_config(sys.argv[1], sys.argv[2:]), trainer="stand_in_trainer"))
"""


def start(output: Path, behaviour: str) -> subprocess.Popen[str]:
    """A launcher with two stand-in ranks below it."""
    settings = ["parallel.pipeline=1", "observe.metrics_port=0", f"train.output={output}"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {
        "STAND_IN": behaviour,
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return subprocess.Popen(
        [sys.executable, "-c", START, str(TINY), *settings],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def descendants(output: Path) -> list[str]:
    """Command lines of running processes that were started for `output`."""
    lines = (" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(output) in line]


def test_success_ends_with_the_summary_and_keeps_earlier_runs(tmp_path: Path) -> None:
    """Oracle: the summary and the environment as the stand-in ranks themselves wrote them down."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "summary.json").write_text('{"run": "earlier"}')
    process = start(tmp_path, "succeed")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    assert json.loads(out.splitlines()[-1]) == {"run": "stand-in", "steps": 3}
    assert (tmp_path / "tiny.1" / "summary.json").read_text() == '{"run": "earlier"}'
    ranks = [json.loads((tmp_path / "tiny" / f"rank{rank}.json").read_text()) for rank in range(2)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert ranks == [
        {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": threads,
            "DS_ACCELERATOR": "cpu",
        }
        for rank in range(2)
    ]


def test_a_rank_that_fails_decides_the_exit_code(tmp_path: Path) -> None:
    """Oracle: the code and words of the failing rank; an earlier summary must not pass for this run's."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "summary.json").write_text('{"run": "earlier"}')
    process = start(tmp_path, "fail")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 9
    assert out == f"An earlier run is kept in {tmp_path / 'tiny.1'}.\n"
    assert err == "rank 1: no more tokens\nmhc-dist: run tiny failed: its processes ended with exit code 9.\n"
    assert descendants(tmp_path) == []


def test_a_request_to_stop_reaches_the_ranks(tmp_path: Path) -> None:
    """Oracle: the exit code that only the stand-in's own SIGTERM handler gives."""
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "tiny").glob("ready*"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 83
    assert out == ""
    assert err == "mhc-dist: run tiny was stopped by SIGINT.\n"
    assert descendants(tmp_path) == []
