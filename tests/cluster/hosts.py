"""Hosts of our own on this machine: network namespaces on one bridge, each with a name and an address.

    with Hosts(2) as hosts:                       root only
        hosts[1].start(["sshd", ...])             ended with the block, by its process id
        hosts[0].run(["ping", "-c1", hosts[1].name])

The namespaces' names begin with mhcl- and this process's id, so several of these live side by side.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

NETWORK = "10.254.77"
"""Nothing leaves the machine: the bridge has a namespace of its own and no way out."""


_numbers = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One namespace. `name` resolves on all hosts and is what `hostname` says on this one."""

    name: str
    address: str
    namespace: str
    interface: str = "eth0"
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, command: Sequence[str]) -> list[str]:
        """`command`, to be run on this host. Everything but network, name and /etc/hosts is the machine's."""
        # `ip netns exec` would mount a fresh /sys as well, without the control groups that slurmd looks for.
        hosts = f"/etc/netns/{self.namespace}/hosts"
        own = f'hostname "$0" && mount --bind {hosts} /etc/hosts && exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", own, self.name, *command]
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *inside]

    def start(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start `command` here; it ends with the hosts at the latest."""
        process = subprocess.Popen(
            self.command(command),
            env={**os.environ, **(environ or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def run(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` here to its end."""
        return subprocess.run(
            self.command(command),
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def pids(self) -> list[int]:
        """Every process of this host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], check=True, capture_output=True, text=True
        )
        return [int(pid) for pid in listed.stdout.split()]

    def unplug(self) -> None:
        """As if the cable were pulled: nobody is told."""
        ip("-n", self.namespace, "link", "set", self.interface, "down")

    def kill_all(self) -> None:
        """End every process of this host, each by its id, and wait until none is left."""
        deadline = time.monotonic() + 20
        while pids := self.pids():
            for pid in pids:
                try:
                    psutil.Process(pid).kill()
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.05)
            assert time.monotonic() < deadline, f"processes {pids} of {self.name} do not end"
        for process in self.processes:
            process.communicate()


class Hosts:
    """`count` hosts named node0, node1, ... (or `names`); a context manager."""

    def __init__(self, count: int, names: Sequence[str] | None = None) -> None:
        self._names = list(names or (f"node{number}" for number in range(count)))
        assert len(self._names) == count, names
        self._hosts: list[Host] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            # Several of these may be open at once; a namespace's name is at most a file name long.
            prefix = f"mhcl-{os.getpid()}-{next(_numbers)}"
            hub = self._namespace(opening, f"{prefix}-hub")
            ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            ip("-n", hub, "link", "set", "bridge", "up")
            entries = "".join(
                f"{NETWORK}.{number} {name}\n" for number, name in enumerate(self._names, start=1)
            )
            for number, name in enumerate(self._names, start=1):
                space = self._namespace(opening, f"{prefix}-{name}"[:60])
                self._etc(opening, space, f"127.0.0.1 localhost\n{entries}")
                peer = f"port{number}"
                ip("-n", hub, "link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", space)
                ip("-n", hub, "link", "set", peer, "master", "bridge", "up")
                ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
                for interface in ("eth0", "lo"):
                    ip("-n", space, "link", "set", interface, "up")
                host = Host(name, f"{NETWORK}.{number}", space)
                opening.callback(host.kill_all)
                self._hosts.append(host)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number]

    def __len__(self) -> int:
        return len(self._hosts)

    def _namespace(self, opening: ExitStack, name: str) -> str:
        ip("netns", "add", name)
        opening.callback(ip, "netns", "delete", name)
        return name

    def _etc(self, opening: ExitStack, namespace: str, hosts: str) -> None:
        """What `ip netns exec` shows as /etc/hosts inside the namespace."""
        folder = Path("/etc/netns") / namespace
        folder.mkdir(parents=True)
        opening.callback(folder.rmdir)
        (folder / "hosts").write_text(hosts)
        opening.callback((folder / "hosts").unlink)


@dataclass(frozen=True)
class SshServers:
    """sshd on every host, with one key for all; `environ` is what a client needs."""

    folder: Path
    environ: dict[str, str]


def start_ssh(
    hosts: Hosts, opening: ExitStack, wrap: Mapping[int, Sequence[str]] | None = None
) -> SshServers:
    """Start a real sshd on every host and wait until each lets us in.

    wrap: by number of the host, a command that is to run its sshd, with all that sshd starts.
    """
    folder = Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="mhcl-ssh-")))
    for name in ("host_key", "id"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=30
        )
    (folder / "id.pub").rename(folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"Port 22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
        "UsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights
    arguments = (
        f"-i {folder}/id -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    servers = SshServers(folder, {"PDSH_SSH_ARGS_APPEND": arguments})
    for number in range(len(hosts)):
        sshd = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
        hosts[number].start([*(wrap or {}).get(number, ()), *sshd])
    for number in range(len(hosts)):
        deadline = time.monotonic() + 20
        while hosts[0].run(["ssh", *arguments.split(), hosts[number].name, "true"]).returncode:
            assert time.monotonic() < deadline, f"sshd of {hosts[number].name} lets nobody in"
            time.sleep(0.2)
    return servers
