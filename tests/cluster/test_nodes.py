"""Runs over two hosts: real sshd, pdsh, mpirun, real training; and what goes wrong there."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_runs import (
    ENVIRON,
    ROOT,
    SAVING,
    kill_a_rank,
    losses,
    need,
    processes_of,
    summary,
    train_command,
    wait_for_commit,
    wait_for_step,
)
from hosts import Host, Hosts, start_ssh

pytestmark = pytest.mark.needs_root


@dataclass
class Cluster:
    hosts: Hosts
    environ: dict[str, str]
    ssh_folder: Path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need("ip", "unshare", "ssh", "sshd", "pdsh")
    with ExitStack() as opening:
        hosts = opening.enter_context(Hosts(2))
        servers = start_ssh(hosts, opening)
        yield Cluster(hosts, ENVIRON | servers.environ, servers.folder)


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """One rank on the first host, three on the second; comments and empty lines as people write them."""
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nnode0 slots=1  # the first\n\nnode1 slots=3\n")
    return path


def test_pdsh_over_sshd(cluster: Cluster, uneven: Path, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss; the variables of a file with empty lines, as it was forwarded."""
    (tmp_path / ".deepspeed_env").write_text("# for all nodes\n\nMHC_TEST_VALUE=a,b\n\n")
    process = cluster.hosts[0].start(
        train_command(tmp_path / "runs", "--hostfile", str(uneven)), cluster.environ, cwd=tmp_path
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert summary(out)["train_loss"] == pytest.approx(loss, abs=1e-6)
    forwarded = (tmp_path / "runs" / "tiny" / "launch" / "environment").read_text()
    assert "MHC_TEST_VALUE=a,b\n" in forwarded
    assert "MASTER_ADDR=node0\n" in forwarded
    assert "Traceback" not in err
    assert processes_of(tmp_path) == []


def test_two_nodes_without_ssh(cluster: Cluster, uneven: Path, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss. The second node leaves the run's folder to the first."""
    started = [
        cluster.hosts[number].start(
            train_command(
                tmp_path / "runs",
                *("--hostfile", str(uneven), "--no-ssh", "--node-rank", str(number)),
                *("--master-addr", cluster.hosts[0].address, "--master-port", "29511"),
            ),
            ENVIRON,
        )
        for number in range(2)
    ]
    answers = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert summary(answers[0][0])["train_loss"] == pytest.approx(loss, abs=1e-6)
    assert answers[1][0] == "", "rank 0's node alone has the summary"


def test_open_mpi_over_sshd(cluster: Cluster, uneven: Path, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss. mpirun forwards no master address by itself."""
    done = cluster.hosts[0].run(
        train_command(tmp_path / "runs", "--hostfile", str(uneven), "--launcher", "openmpi"),
        cluster.environ,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert summary(done.stdout)["train_loss"] == pytest.approx(loss, abs=1e-6)


def test_ranks_that_mpirun_started(cluster: Cluster, tmp_path: Path, loss: float) -> None:
    """Oracle: the single-node run's loss; every process of `mpirun mhc-dist train --launcher none` is a"
    " rank."""
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "4"]
    done = cluster.hosts[0].run(
        [*command, *train_command(tmp_path / "runs", "--launcher", "none")], ENVIRON, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert summary(done.stdout)["train_loss"] == pytest.approx(loss, abs=1e-6)


def test_a_request_to_stop_reaches_ranks_on_other_hosts(
    cluster: Cluster, uneven: Path, tmp_path: Path
) -> None:
    """Oracle: exit code 83 of guard/exit_codes.py, and no process of the run left on either host."""
    process = cluster.hosts[0].start(
        train_command(tmp_path, "--hostfile", str(uneven), overrides=("train.steps=100000",)), cluster.environ
    )
    wait_for_step(tmp_path, 2, process)
    launcher = next(found for found in processes_of(tmp_path) if "mhc-dist" in " ".join(found.cmdline()[:2]))
    launcher.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 83, err
    assert err.splitlines()[-1] == "mhc-dist: run tiny was stopped by SIGTERM."
    assert not out.strip().endswith("}")
    assert processes_of(tmp_path) == []


def test_one_node_killed_ends_the_rest(tmp_path: Path) -> None:
    """Oracle: the host whose cable this test pulls before it kills everything there: 81, within 60 s."""
    need("ip", "unshare", "ssh", "sshd", "pdsh")
    with ExitStack() as opening:
        hosts = opening.enter_context(Hosts(2, ["left", "right"]))
        servers = start_ssh(hosts, opening)
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("left slots=2\nright slots=2\n")
        process = hosts[0].start(
            train_command(tmp_path / "runs", "--hostfile", str(hostfile), overrides=("train.steps=100000",)),
            ENVIRON | servers.environ,
        )
        wait_for_step(tmp_path / "runs", 2, process)
        hosts[1].unplug()
        hosts[1].kill_all()
        began = time.monotonic()
        out, err = process.communicate(timeout=120)
        seconds = time.monotonic() - began
        assert process.returncode == 81, (out, err)
        assert seconds < 60, f"{seconds:.0f} s"
        assert "no heartbeat" in err
        assert "mhc-dist: run tiny failed on rank" in err.splitlines()[-1]
        # What could not be reached is said, not passed over.
        assert "host right cannot be asked" in err
        assert processes_of(tmp_path / "runs") == []
        print(f"one node killed: the rest ended after {seconds:.1f} s with 81")


# ---- a crash in the middle: started again from the last commit, on all nodes


def test_pdsh_starts_a_killed_run_again(
    cluster: Cluster, uneven: Path, tmp_path: Path, uninterrupted: list[object]
) -> None:
    """Oracle: the run that nobody killed, bit for bit. The first crash, on the second host, is answered by a
    restart on both; the second one, of the rank with the run's store, ends the run with a crash's code."""
    command = train_command(tmp_path, "--hostfile", str(uneven), "--max-restarts", "1", overrides=SAVING)
    process = cluster.hosts[0].start(command, cluster.environ)
    first = wait_for_commit(tmp_path, 0, process)
    kill_a_rank(cluster.hosts[1])
    # What is committed between our look and the death is as good.
    wait_for_commit(tmp_path, first + 4, process)
    kill_a_rank(cluster.hosts[0])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 81, (out, err)
    restarted = re.search(r"restart 1 of 1 of run tiny from step (\d+)\.", err)
    assert restarted, err
    assert f"resumed from step {restarted[1]}" in err
    assert "mhc-dist: run tiny failed on rank" in err.splitlines()[-1]
    made = losses(tmp_path)
    assert len(made) > int(restarted[1]) >= first
    assert made == uninterrupted[: len(made)]
    assert processes_of(tmp_path) == []


def test_open_mpi_starts_a_killed_run_again(
    cluster: Cluster, uneven: Path, tmp_path: Path, uninterrupted: list[object]
) -> None:
    """Oracle: the run that nobody killed, bit for bit."""
    options = ("--hostfile", str(uneven), "--launcher", "openmpi", "--max-restarts", "1")
    process = cluster.hosts[0].start(train_command(tmp_path, *options, overrides=SAVING), cluster.environ)
    wait_for_commit(tmp_path, 0, process)
    kill_a_rank(cluster.hosts[1])
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    assert "restart 1 of 1 of run tiny from step" in err
    assert losses(tmp_path) == uninterrupted


def test_nodes_started_one_by_one_start_again_together(
    cluster: Cluster, uneven: Path, tmp_path: Path, uninterrupted: list[object]
) -> None:
    """Oracle: the run that nobody killed, bit for bit. The first node learns of the crash of the second one
    later than the second one itself, whose new ranks must not join what is left of the old run."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=3\nnode1 slots=1\n")
    started = [
        cluster.hosts[number].start(
            train_command(
                tmp_path / "runs",
                *("--hostfile", str(hostfile), "--no-ssh", "--node-rank", str(number)),
                *("--master-addr", cluster.hosts[0].address, "--master-port", "29514"),
                *("--max-restarts", "1"),
                overrides=SAVING,
            ),
            ENVIRON,
        )
        for number in range(2)
    ]
    wait_for_commit(tmp_path / "runs", 0, started[0])
    kill_a_rank(cluster.hosts[1])
    answers = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], answers
    assert all("restart 1 of 1 of run tiny" in err for _, err in answers), answers
    assert losses(tmp_path / "runs") == uninterrupted


# ---- bad input: one message each, with the remedy


def refused(host: Host, command: list[str], environ: dict[str, str], *words: str) -> None:
    done = host.run(command, environ, timeout=200)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    message = [line for line in done.stderr.splitlines() if line.startswith("mhc-dist: ")]
    assert len(message) == 1, done.stderr
    assert [word for word in words if word not in message[0]] == [], message[0]
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("hosts", "options", "words"),
    [
        ("node0 slots=2\n10.254.77.99 slots=2\n", (), ("host 10.254.77.99 cannot be reached", "--no-ssh")),
        ("node0 slots=2\nabsent slots=2\n", (), ("host absent cannot be reached", "Correct the hostfile")),
        ("node0 slots=2\nnode0 slots=2\n", (), ("line 2: host node0 is listed twice", "Keep one line")),
        ("node0 slots=2\nnode1 slots=1\n", (), ("3 slots (node0 2, node1 1)", "needs 4 processes")),
        ("node0 slots=two\n", (), ("line 1: 'node0 slots=two'", "Correct the line")),
        ("localhost slots=2\nnode1 slots=2\n", (), ("localhost stands beside others", "other nodes know it")),
        ("node0 slots=2\nnode1 slots=2\n", ("--interface", "eth7"), ("'eth7'", "does not have", "eth0 (")),
        ("node0 slots=2\nnode1 slots=2\n", ("--interface", "lo"), ("'lo'", "cannot reach", "--interface")),
        (
            "node0 slots=2\nnode1 slots=2\n",
            ("--master-addr", "127.0.0.1"),
            ("127.0.0.1", "cannot reach", "not this host's loopback"),
        ),
        ("node0 slots=2\nnode1 slots=2\n", ("--node-rank", "1"), ("--node-rank 1", "Add --no-ssh")),
    ],
)
def test_wrong_hosts_are_refused(
    cluster: Cluster, hosts: str, options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    """Oracle: the words that name each mistake and its remedy."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(hosts)
    command = train_command(tmp_path / "runs", "--hostfile", str(hostfile), *options)
    refused(cluster.hosts[0], command, cluster.environ, *words)
    assert not (tmp_path / "runs" / "tiny").exists()


def test_missing_ssh_and_pdsh_are_named(cluster: Cluster, uneven: Path, tmp_path: Path) -> None:
    """Oracle: a PATH that lacks them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    command = ["/usr/bin/env", f"PATH={tools}"]
    command += train_command(tmp_path / "runs", "--hostfile", str(uneven))
    refused(cluster.hosts[0], command, cluster.environ, "pdsh is not installed", "apt-get install pdsh")
    (tools / "pdsh").symlink_to("/usr/bin/pdsh")
    refused(cluster.hosts[0], command, cluster.environ, "ssh is not installed", "openssh-client", "--no-ssh")


def test_a_taken_port_is_refused(cluster: Cluster, uneven: Path, tmp_path: Path) -> None:
    """Oracle: a port that this test listens on, on the first host."""
    listener = cluster.hosts[0].start([sys.executable, "-m", "http.server", "29777"])
    try:
        deadline = time.monotonic() + 30
        probe = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 29777), 1)"]
        while cluster.hosts[0].run(probe).returncode:
            assert time.monotonic() < deadline
        command = train_command(tmp_path, "--hostfile", str(uneven), "--master-port", "29777")
        words = ("--master-port 29777 is in use on host node0", "leave it out")
        refused(cluster.hosts[0], command, cluster.environ, *words)
        here = ("--no-ssh", "--node-rank", "0", "--master-addr", "node0")
        words = ("29777 is in use on this host", "another --master-port")
        refused(cluster.hosts[0], [*command, *here], cluster.environ, *words)
    finally:
        listener.kill()
        listener.communicate()


def test_different_code_on_one_node_is_refused(uneven: Path, tmp_path: Path) -> None:
    """Oracle: one source file with a comment more, seen by the second host alone."""
    need("ip", "unshare", "ssh", "sshd", "pdsh", "mount")
    original = ROOT / "mhc_dist" / "topology.py"
    changed = tmp_path / "topology.py"
    changed.write_text(original.read_text() + "# another version\n")
    replaced = f'mount --bind {changed} {original} && exec "$@"'
    with ExitStack() as opening:
        hosts = opening.enter_context(Hosts(2))
        servers = start_ssh(hosts, opening, wrap={1: ["unshare", "--mount", "sh", "-c", replaced, "sh"]})
        environ = ENVIRON | servers.environ
        command = train_command(tmp_path / "runs", "--hostfile", str(uneven))
        refused(hosts[0], command, environ, "host node1 has different code", "Bring all nodes to the same")
        # Without ssh nobody asks beforehand: the roll call finds out.
        started = []
        for number in range(2):
            node = (
                "--no-ssh",
                "--node-rank",
                str(number),
                "--master-addr",
                "node0",
                "--master-port",
                "29512",
            )
            prefix = ["unshare", "--mount", "sh", "-c", replaced, "sh"] if number == 1 else []
            started.append(hosts[number].start([*prefix, *command, *node], environ))
        answers = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [2, 2], answers
        assert "ranks disagree on the code" in answers[0][1], answers
        assert "Start all of them with the same" in answers[0][1].splitlines()[-1]


def test_a_node_that_never_comes_is_named(cluster: Cluster, uneven: Path, tmp_path: Path) -> None:
    """Oracle: the ranks of the node that this test does not start."""
    node = ("--no-ssh", "--node-rank", "0", "--master-addr", "node0", "--master-port", "29513")
    command = train_command(tmp_path, "--hostfile", str(uneven), *node, overrides=("train.join_seconds=20",))
    words = ("3 of 4 ranks did not come within 20 s: 1, 2, 3", "train.join_seconds")
    refused(cluster.hosts[0], command, ENVIRON, *words)
