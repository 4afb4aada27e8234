"""What a start over several nodes is made of: options, hostfile, forwarded variables, interfaces, words."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mhc_launcher import interfaces, mpi, nodes, rank, run_folder
from mhc_launcher.forwarded import read_variables, user_variables, write_variables
from mhc_launcher.hostfile import Host, check_slots, read_hostfile, write_hostfile
from mhc_launcher.interfaces import network_settings
from mhc_launcher.marked import is_rank
from mhc_launcher.start_options import Launcher, StartOptions, checked

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.last_words import FAILURE_FILE, REPORTED, LastWords

HOSTS = Path("hosts")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (StartOptions(launcher=Launcher.PDSH), "Add --hostfile"),
        (StartOptions(launcher=Launcher.SLURM, hostfile=HOSTS), "Slurm's allocation: leave out --hostfile"),
        (StartOptions(launcher=Launcher.NONE, hostfile=HOSTS), "the environment: leave out --hostfile"),
        (StartOptions(no_ssh=True, hostfile=HOSTS), "--no-ssh needs --master-addr"),
        (StartOptions(no_ssh=True, master_addr="a"), "--no-ssh needs --hostfile"),
        (StartOptions(no_ssh=True, hostfile=HOSTS, master_addr="a"), "--no-ssh needs --node-rank"),
        (StartOptions(no_ssh=True, hostfile=HOSTS, launcher=Launcher.PDSH), "Leave out one of the two"),
        (StartOptions(node_rank=1), "Add --no-ssh"),
        (StartOptions(interface="eth0"), "--interface eth0 has no effect"),
        (StartOptions(master_port=99999), "--master-port 99999 is no port"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: StartOptions, words: str) -> None:
    """Oracle: the words that name each remedy."""
    with pytest.raises(ValueError, match=words):
        checked(options, {})


def test_options_get_their_defaults() -> None:
    """Oracle: pdsh where a hostfile is given alone; a pod's index where it has one."""
    assert checked(StartOptions(hostfile=HOSTS), {}).launcher is Launcher.PDSH
    pod = StartOptions(no_ssh=True, hostfile=HOSTS, master_addr="a")
    assert checked(pod, {"JOB_COMPLETION_INDEX": "3"}).node_rank == 3


def test_hostfiles_are_read_as_people_write_them(tmp_path: Path) -> None:
    """Oracle: two hosts among comments and empty lines; what is written is read back."""
    path = tmp_path / "hosts"
    path.write_text("# all\n\n a  slots=1   # first\nb slots=3\n")
    hosts = [Host("a", 1), Host("b", 3)]
    assert read_hostfile(path) == hosts
    write_hostfile(path, hosts)
    assert path.read_text() == "a slots=1\nb slots=3\n"
    check_slots(hosts, 4, 2, 2, "hosts")
    with pytest.raises(ValueError, match=r"4 slots \(a 1, b 3\), .* needs 6"):
        check_slots(hosts, 6, 3, 2, "hosts")


@pytest.mark.parametrize("line", ["a slots=0", "a", "a slots=-1", "a slots=2 b slots=3"])
def test_lines_that_name_no_host_are_refused(line: str, tmp_path: Path) -> None:
    """Oracle: the line's number and the form that is expected."""
    path = tmp_path / "hosts"
    path.write_text(f"ok slots=1\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2: .*host slots=4"):
        read_hostfile(path)


def test_variables_survive_empty_lines_and_arrive_unchanged(tmp_path: Path) -> None:
    """Oracle: DeepSpeed's own reader of the written file: split at the first =, once per line."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    (home / ".deepspeed_env").write_text("A=1\n\n# comment\nexport B='two'\n")
    (here / ".deepspeed_env").write_text("\nA=x=y\n")
    found = user_variables({}, home, here)
    assert found == {"A": "x=y", "B": "two"}
    path = tmp_path / "environment"
    write_variables(path, found)
    with path.open() as file:
        assert dict(line.strip().split("=", maxsplit=1) for line in file.readlines()) == found


def test_values_that_would_arrive_changed_are_refused(tmp_path: Path) -> None:
    """Oracle: a space needs a shell's quotes, which mpirun does not undo; a comma ends srun's list."""
    with pytest.raises(ValueError, match=r"A='x y' cannot be forwarded.*Set A on the nodes"):
        write_variables(tmp_path / "e", {"A": "x y"})
    write_variables(tmp_path / "e", {"A": "x,y"})
    with pytest.raises(ValueError, match=r"A='x,y' cannot be forwarded"):
        write_variables(tmp_path / "e", {"A": "x,y"}, commas=False)
    (tmp_path / "bad").write_text("A=1\nno equals sign\n")
    with pytest.raises(ValueError, match=r"line 2: 'no equals sign' is not of the form"):
        read_variables(tmp_path / "bad")


def test_interfaces_are_chosen_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a host with loopback and one network, made by hand."""
    monkeypatch.setattr(interfaces, "addresses", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5"]})
    monkeypatch.setattr(interfaces, "interface_to", lambda address: "eth0")
    assert network_settings({}, "10.0.0.1", several_hosts=False) == {}
    chosen = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    assert network_settings({}, "10.0.0.1", several_hosts=True) == chosen
    assert network_settings({"GLOO_SOCKET_IFNAME": "eth0"}, "10.0.0.1", several_hosts=True) == {}
    with pytest.raises(ValueError, match=r"'ib7', which host .* does not have\. It has eth0 \(10\.0\.0\.5\)"):
        network_settings({"GLOO_SOCKET_IFNAME": "ib7"}, "10.0.0.1", several_hosts=True)
    with pytest.raises(ValueError, match=r"'lo' .* cannot reach"):
        network_settings({"GLOO_SOCKET_IFNAME": "lo"}, "10.0.0.1", several_hosts=True)
    # Both said: several "hosts" on one machine, to try things out.
    assert network_settings({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1", several_hosts=True) == {}


def test_mpirun_is_told_what_the_user_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: arguments by hand; the user's come last and an interface of theirs replaces ours."""
    monkeypatch.setattr(mpi.os, "geteuid", lambda: 1000)
    assert mpi.arguments("eth1", ["-v"]) == ["--bind-to", "none", "--mca", "btl_tcp_if_include", "eth1", "-v"]
    own = ["--mca", "btl_tcp_if_include", "ib0"]
    assert mpi.arguments("eth1", own) == ["--bind-to", "none", *own]
    monkeypatch.setattr(mpi.os, "geteuid", lambda: 0)
    assert "--allow-run-as-root" in mpi.arguments(None, [])


def test_ranks_are_known_by_their_command_lines() -> None:
    """Oracle: command lines as DeepSpeed's launchers make them."""
    trainer = "mhc_dist.train"
    assert is_rank(["python", "-u", "-m", trainer, "--local_rank=0"], trainer)
    assert is_rank(["python", "-u", "/x/mhc_dist/train.py", "--config", "c"], trainer)
    assert not is_rank(["python", "-u", "-m", "deepspeed.launcher.launch", "--module", trainer], trainer)


def test_the_first_rank_to_fail_leaves_the_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the file of the first, and a line on stderr only where nobody reads the folder."""
    assert LastWords(tmp_path, 2, {}).leave(ExitCode.USAGE, "no room.") == 2
    assert capsys.readouterr().err == "[rank 2] no room.\n"
    assert LastWords(tmp_path, 0, {}).leave(ExitCode.PEER_DIED, "rank 2 failed") == 81
    assert capsys.readouterr().err == ""
    told = json.loads((tmp_path / FAILURE_FILE).read_text())
    assert told == {"rank": 2, "exit_code": 2, "message": "no room."}
    elsewhere = tmp_path / "absent"
    LastWords(elsewhere, 1, {REPORTED: "1"}).leave(ExitCode.ERROR, "x")
    assert capsys.readouterr().err == ""
    LastWords(elsewhere, 1, {}).leave(ExitCode.ERROR, "x")
    assert capsys.readouterr().err == "[rank 1] x.\n"


def test_last_words_that_do_not_fit_on_the_disk_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the message; an empty file would be taken for the word of the first, and be unreadable."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r") -> io.StringIO:
        path.touch()
        return Full()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        LastWords(tmp_path, 3, {REPORTED: "1"}).leave(ExitCode.ERROR, "x")
    assert capsys.readouterr().err == "[rank 3] x.\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / FAILURE_FILE).write_text("")
    assert run_folder.read_failure(tmp_path) is None


def test_ranks_on_gpus_start_with_what_cuda_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the variables at the moment when the trainer is first run, and those that other nodes get: one
    set here, one by the user's file, one by nobody; on CPUs none of them. What would hang starts nothing.
    """
    (tmp_path / ".deepspeed_env").write_text("CUDA_DEVICE_MAX_CONNECTIONS=16\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"PYTORCH_ALLOC_CONF": "backend:native", "HOME": str(tmp_path)})
    report: Any = SimpleNamespace(num_cpus=4)

    def forwarded(*, on_gpus: bool) -> dict[str, str]:
        return nodes._variables(StartOptions(), [Host("a", 4)], [report], on_gpus, "a", 29500, "mark")

    want = {
        "CUDA_MODULE_LOADING": "EAGER",
        "CUDA_DEVICE_MAX_CONNECTIONS": "16",
        "PYTORCH_ALLOC_CONF": "backend:native",
    }
    assert want.items() <= forwarded(on_gpus=True).items()
    assert "CUDA_MODULE_LOADING" not in forwarded(on_gpus=False)

    seen: list[str | None] = []
    monkeypatch.setattr(rank, "visible_gpus", lambda: ["0"])
    monkeypatch.setattr(
        rank.runpy, "run_module", lambda *a, **k: seen.append(os.environ.get("CUDA_MODULE_LOADING"))
    )
    monkeypatch.setattr(rank.sys, "argv", [])
    rank._run("trainer", "gloo", tmp_path, None)
    rank._run("trainer", "auto", tmp_path, None)
    assert seen == [None, "EAGER"]
    os.environ["CUDA_MODULE_LOADING"] = "LAZY"
    with pytest.raises(ValueError, match="CUDA_MODULE_LOADING=LAZY"):
        forwarded(on_gpus=True)
    with pytest.raises(ValueError, match="CUDA_MODULE_LOADING=LAZY"):
        rank._run("trainer", "auto", tmp_path, None)
