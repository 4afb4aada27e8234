"""`mhc-dist train --max-restarts` while ranks are killed. Oracle: the run that nobody killed, bit for bit.

Twenty runs with four real processes each: for `make test-long`. What is drawn from a seed is who dies, and
when; three such moments are in `make test` (tests/multi_rank/test_kill.py).

    MHC_DIST_KILLS=results/kills.json pytest -m long tests/end_to_end/test_restarts.py

keeps what was found, a line per seed; seeds that are not run this time stay as they are.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from mhc_dist.bench.result import write_result
from mhc_dist.checkpoint.folder import FOLDER, UNCOMMITTED, committed
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


@contextmanager
def started(chosen: list[str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`mhc-dist train`; asked to stop when the block is left before it has ended."""
    overrides = [word for setting in chosen for word in ("--set", setting)]
    command = [sys.executable, "-c", START, "train", str(TINY), *overrides, *arguments]
    process = subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=120)


def run_to_end(chosen: list[str], *arguments: str) -> str:
    """What the run said; fails unless it makes all its steps."""
    with started(chosen, *arguments) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


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
    run_to_end(chosen)
    return load_config(TINY, chosen)


class Moment(NamedTuple):
    """What a seed stands for. delay_seconds: after the step's line in the log, or the save's first file."""

    rank: int
    after_step: int
    in_save: bool
    delay_seconds: float
    mode: str

    @staticmethod
    def of(seed: int, num_ranks: int) -> Moment:
        """Odd seeds are for saves; after_step=0 is a moment while the ranks start, meet and load."""
        draw = random.Random(1000 + seed)
        rank, after_step = draw.randrange(num_ranks), draw.randrange(0, STEPS)
        in_save = seed % 2 == 1
        longest = 0.05 if in_save else 0.5 if after_step else 8.0
        return Moment(rank, after_step, in_save, draw.uniform(0.0, longest), draw.choice(("async", "sync")))


def kill_at(process: subprocess.Popen[str], config: RunConfig, when: Moment) -> bool:
    """SIGKILL to one rank when the moment has come; False where the run had ended before."""
    log, checkpoints = config.folder / LOG_FILE, config.folder / FOLDER

    def come() -> bool:
        if when.after_step and (not log.exists() or log.read_bytes().count(b"\n") < when.after_step):
            return False
        return not when.in_save or any(checkpoints.glob(f"step_*{UNCOMMITTED}"))

    ranks: list[psutil.Process] = []
    while process.poll() is None and len(ranks) < config.num_processes:
        ranks = ranks_of(process)
    while process.poll() is None and not come():
        time.sleep(0.001)
    time.sleep(when.delay_seconds)
    alive = [rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks]
    if process.poll() is not None or not all(alive):
        return False
    ranks[when.rank].kill()
    return True


def resumed_step(output: str) -> int:
    """Where the restarted run began, from what it said."""
    found = re.findall(r"resumed from step (\d+)", output)
    assert found or "starting at step 0" in output, output
    return int(found[-1]) if found else 0


def last_action(output: str, rank: int) -> str | None:
    """What the dead rank did last, as the others tell; None where it died before they watched it."""
    found = re.search(rf"rank {rank} \([^)]*\) died: .*?Last known action: (.*?), begun", output)
    return found[1] if found else None


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[str, dict[str, object]]]:
    """What was found, by seed; written where MHC_DIST_KILLS says."""
    path = Path(os.environ.get("MHC_DIST_KILLS", os.devnull))
    found = json.loads(path.read_text())["figures"]["kills"] if path.is_file() else {}
    yield found
    if path.suffix == ".json":
        command = f"MHC_DIST_KILLS={path} pytest -m long tests/end_to_end/test_restarts.py"
        label = (
            "measured: SIGKILL to one of 4 ranks on this machine, started by mhc-dist train --max-restarts 3"
        )
        counts = {
            "num_seeds": len(found),
            "num_killed": sum(bool(kill["killed"]) for kill in found.values()),
            "num_in_save": sum(bool(kill["being_written"]) for kill in found.values()),
            "num_bit_equal": sum(bool(kill["bit_equal"]) for kill in found.values()),
            "steps": STEPS,
            "every_steps": EVERY,
        }
        kills = dict(sorted(found.items(), key=lambda item: int(item[0])))
        write_result(path.stem, path.parent, command, label, {**counts, "kills": kills})


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_run_restarts_by_itself(
    seed: int, whole: RunConfig, corpus: Path, tmp_path: Path, kept: dict[str, dict[str, object]]
) -> None:
    when = Moment.of(seed, whole.num_processes)
    chosen = [*settings(tmp_path, corpus), f"checkpoint.mode={when.mode}"]
    config = load_config(TINY, chosen)
    with started(chosen, "--max-restarts", "3") as process:
        killed = kill_at(process, config, when)
        before = committed(config.folder / FOLDER)
        saving = [folder.name for folder in (config.folder / FOLDER).glob(f"step_*{UNCOMMITTED}")]
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert json.loads(out.splitlines()[-1])["steps"] == STEPS
    restarted = "restart 1 of 3 of run tiny" in out
    # A moment after the last step finds nobody to kill any more; all others are answered by a restart.
    assert restarted or not killed or "is complete" in out, out
    resumed = resumed_step(out) if restarted else None
    # What was committed when the rank died is the least that is resumed from: another commit may have been
    # under way.
    assert resumed is None or max(before, default=0) <= resumed <= STEPS, out
    kept[str(seed)] = {
        **when._asdict(),
        "killed": killed,
        "committed_before": sorted(before),
        "being_written": saving,
        "last_action": last_action(out, when.rank),
        "restarted": restarted,
        "resumed_step": resumed,
        "bit_equal": False,
    }
    print(f"seed {seed}: {kept[str(seed)]}")
    assert resumed is None or resumed % EVERY == 0 or resumed == STEPS
    assert reproduced(config) == reproduced(whole)
    same_tensors(config.folder, whole.folder)
    Checkpoint.open(config.folder)
    kept[str(seed)]["bit_equal"] = True


def test_preempted_run_is_continued_by_the_same_command(
    whole: RunConfig, corpus: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to the launcher, as Slurm sends it: exit code 84, and again the command that started it."""
    chosen = settings(tmp_path, corpus)
    config = load_config(TINY, chosen)
    with started(chosen, "--resume", "auto") as process:
        while process.poll() is None and not (config.folder / LOG_FILE).exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 84, out
    assert "resumed from step" in run_to_end(chosen, "--resume", "auto")
    assert reproduced(config) == reproduced(whole)
    assert "has made all its 16 steps" in run_to_end(chosen, "--resume", "auto")
