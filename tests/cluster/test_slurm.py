"""A real Slurm of two nodes on hosts of our own: sbatch, srun, training."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_runs import (
    ENVIRON,
    MHC_DIST,
    SAVING,
    SMALL,
    TINY,
    kill_a_rank,
    losses,
    need,
    settings,
    summary,
    wait_for_commit,
)
from hosts import Hosts

pytestmark = pytest.mark.needs_root


@dataclass
class Slurm:
    hosts: Hosts
    environ: dict[str, str]


def write_configuration(folder: Path) -> Path:
    """One controller and two nodes of two processors each; nothing that needs systemd or control groups."""
    for name in ("state", "spool-node0", "spool-node1"):
        (folder / name).mkdir()
    path = folder / "slurm.conf"
    path.write_text(
        f"""ClusterName=mhcl
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
NodeName=node[0-1] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
    )
    return path


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("ip", "unshare", "munged", "slurmctld", "slurmd", "srun", "sbatch")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    configuration = write_configuration(folder)
    key = folder / "munge.key"
    key.write_bytes(bytes(range(256)) * 4)
    key.chmod(0o400)
    environ = ENVIRON | {"SLURM_CONF": str(configuration)}
    with ExitStack() as opening:
        hosts = opening.enter_context(Hosts(2))
        munged = ["/usr/sbin/munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
        munged += [f"--key-file={key}", f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid"]
        hosts[0].start([*munged, f"--seed-file={folder}/munged.seed"], environ)
        hosts[0].start(["/usr/sbin/slurmctld", "-D"], environ)
        for number in range(2):
            hosts[number].start(["/usr/sbin/slurmd", "-D", "-N", f"node{number}"], environ)
        deadline = time.monotonic() + 90
        while "idle" not in (seen := hosts[0].run(["sinfo", "-h", "-o", "%t %D"], environ)).stdout or (
            " 2" not in seen.stdout
        ):
            logs = [log.read_text()[-2000:] for log in folder.glob("slurmd*.log")]
            assert time.monotonic() < deadline, "\n".join([seen.stdout, *logs])
            time.sleep(0.5)
        yield Slurm(hosts, environ)


def wait_for_job(slurm: Slurm, job: str, log: Path, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while slurm.hosts[0].run(["squeue", "-h", "-j", job, "-o", "%T"], slurm.environ).stdout.strip():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "the job does not end"
        time.sleep(0.5)
    return log.read_text()


def rendered(folder: Path, *overrides: str) -> str:
    """The script as `mhc-dist slurm render` writes it, with this environment in its PATH."""
    shape = ["--nodes", "2", "--gpus-per-node", "0", "--processes-per-node", "2", "--cpus-per-task", "1"]
    done = subprocess.run(
        [
            *(MHC_DIST, "slurm", "render", str(TINY), *shape, "--time", "00:30:00"),
            *settings(folder / "runs", *overrides),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.replace("# exec:", f"export PATH={Path(sys.executable).parent}:$PATH\n# exec:")


def submit(slurm: Slurm, text: str, log: Path) -> str:
    """The number of the new job."""
    script = log.with_suffix(".sbatch")
    script.write_text(text)
    done = slurm.hosts[0].run(
        ["sbatch", "--parsable", "--output", str(log), "--chdir", str(log.parent), str(script)],
        slurm.environ,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_rendered_script_trains_on_two_nodes(slurm: Slurm, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss; the script as `mhc-dist slurm render` writes it."""
    log = tmp_path / "job.log"
    job = submit(slurm, rendered(tmp_path), log)
    text = wait_for_job(slurm, job, log, 400)
    found = next((line for line in text.splitlines() if line.startswith('{"run"')), None)
    assert found is not None, text
    assert summary(found)["train_loss"] == pytest.approx(loss, abs=1e-6)


def test_a_job_is_started_again_and_submitted_again(
    slurm: Slurm, tmp_path: Path, uninterrupted: list[object]
) -> None:
    """Oracle: the run that nobody disturbed, bit for bit. A rank dies: the job starts its run again. Slurm's
    signal before the end of its time: the run is saved. The same script once more brings it to its end."""
    script = rendered(tmp_path, *SAVING).replace("--resume auto", "--resume auto --max-restarts 1")
    assert "--max-restarts 1" in script
    log, runs = tmp_path / "job.log", tmp_path / "runs"
    job = submit(slurm, script, log)
    first = wait_for_commit(runs, 0)
    kill_a_rank(slurm.hosts[1])
    wait_for_commit(runs, first + 4)
    assert slurm.hosts[0].run(["scancel", "--batch", "--signal=TERM", job], slurm.environ).returncode == 0
    text = wait_for_job(slurm, job, log, 400)
    assert "restart 1 of 1 of run tiny from step" in text, text
    assert "mhc-dist: run tiny was stopped by SIGTERM." in text, text
    assert not (runs / "tiny" / "summary.json").exists(), text
    again = tmp_path / "again.log"
    text = wait_for_job(slurm, submit(slurm, script, again), again, 400)
    assert "resumed from step" in text, text
    assert losses(runs) == uninterrupted


def test_ranks_that_srun_started(slurm: Slurm, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss; every task of `srun mhc-dist train --launcher none` is a rank."""
    values = [*SMALL, f"train.output={tmp_path / 'runs'}"]
    overrides = [part for value in values for part in ("--set", value)]
    done = slurm.hosts[0].run(
        [
            *("srun", "--nodes", "2", "--ntasks-per-node", "2", "--chdir", str(tmp_path)),
            *(MHC_DIST, "train", str(TINY), "--launcher", "none", *overrides),
        ],
        slurm.environ,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"run"'))
    assert summary(line)["train_loss"] == pytest.approx(loss, abs=1e-6)


def test_outside_of_an_allocation_slurm_is_refused(tmp_path: Path) -> None:
    """Oracle: an environment without Slurm's variables, and the words that say what to do."""
    import os

    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(
        [MHC_DIST, "train", str(TINY), "--launcher", "slurm", "--set", f"train.output={tmp_path}"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "SLURM_JOB_NODELIST is not set" in done.stderr
    assert "slurm render" in done.stderr
