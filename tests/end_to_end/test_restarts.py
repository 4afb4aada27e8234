"""`mhc-dist train --max-restarts` while ranks are killed. Oracle: the run that nobody killed, bit for bit.

Twenty runs with four real processes each: for `make test-long`. What is drawn from a seed is who dies, and
when; three such moments are in `make test` (tests/multi_rank/test_kill.py).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mhc_dist.checkpoint.read import Checkpoint
from mhc_dist.config import RunConfig, load_config
from mhc_dist.observe.run_log import LOG_FILE, read_log
from tests.multi_rank.forked_run import write_corpus
from tests.multi_rank.test_checkpoint import same_tensors

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
START = "from mhc_launcher.cli import main; main()"
STEPS, EVERY = 16, 3
REPRODUCED = ("step", "loss", "grad_norm", "learning_rate", "validation_loss", "expert_load_max_to_mean")
SEEDS = range(20)

pytestmark = pytest.mark.long


def settings(output: Path, corpus: Path) -> list[str]:
    return [
        f"train.output={output}",
        f"data.corpus={corpus}",
        "data.sequence_length=32",
        "model.hidden_size=64",
        "train.validate_every=5",
        "train.validation_batches=1",
        f"train.steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "observe.metrics_port=0",
    ]


def start(config: Path, chosen: list[str], *arguments: str) -> subprocess.Popen[str]:
    overrides = [word for setting in chosen for word in ("--set", setting)]
    command = [sys.executable, "-c", START, "train", str(config), *overrides, *arguments]
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of ranks below a launcher, in rank order."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[1:4] == ["-u", "-m", "mhc_dist.train"]:
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


def reproduced(config: RunConfig) -> list[list[object]]:
    return [[record.get(key) for key in REPRODUCED] for record in read_log(config.folder)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text", num_files=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> RunConfig:
    chosen = settings(tmp_path_factory.mktemp("whole"), corpus)
    process = start(TINY, chosen)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return load_config(TINY, chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_run_restarts_by_itself(seed: int, whole: RunConfig, corpus: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, corpus)
    config = load_config(TINY, chosen)
    draw = random.Random(1000 + seed)
    rank, after_step = draw.randrange(config.num_processes), draw.randrange(0, STEPS)
    in_save = seed % 2 == 1
    delay = draw.uniform(0.0, 0.05 if in_save else 0.5)
    process = start(TINY, chosen, "--max-restarts", "3")
    log = config.folder / LOG_FILE

    def come() -> bool:
        num_steps = log.read_bytes().count(b"\n") if log.exists() else 0
        if num_steps < after_step or len(ranks_of(process)) < config.num_processes:
            return False
        return not in_save or any((config.folder / "checkpoints").glob("step_*.tmp"))

    while process.poll() is None and not come():
        time.sleep(0.002)
    time.sleep(delay)
    victims = ranks_of(process) if process.poll() is None else []
    killed = len(victims) == config.num_processes
    if killed:
        victims[rank].send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    where = "in a save" if in_save else "anywhere"
    print(f"seed {seed}: rank {rank} after step {after_step}, {where}: {'killed' if killed else 'too late'}")
    print("\n".join(line for line in out.splitlines() if "restart" in line or "resumed" in line))
    assert process.returncode == 0, out
    assert json.loads(out.splitlines()[-1])["steps"] == STEPS
    # A moment after the last step finds nobody to kill any more; all others are answered by a restart.
    assert not killed or "restart 1 of 3 of run tiny" in out or "is complete" in out, out
    assert reproduced(config) == reproduced(whole)
    same_tensors(config.folder, whole.folder)
    Checkpoint.open(config.folder)


def test_preempted_run_is_continued_by_the_same_command(
    whole: RunConfig, corpus: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to the launcher, as Slurm sends it: exit code 84, and again the command that started it."""
    chosen = settings(tmp_path, corpus)
    config = load_config(TINY, chosen)
    process = start(TINY, chosen, "--resume", "auto")
    while process.poll() is None and not (config.folder / LOG_FILE).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 84, out
    process = start(TINY, chosen, "--resume", "auto")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "resumed from step" in out
    assert reproduced(config) == reproduced(whole)
    again = start(TINY, chosen, "--resume", "auto")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "has made all its 16 steps" in out
