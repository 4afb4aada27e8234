"""A slow network on one host: each rank in a network namespace, joined by a bridge, at a given rate.

    rank 0 [eth0] ==veth==+                          tbf at both ends of every veth: what leaves a rank and
    rank 1 [eth0] ==veth==+== bridge, in a hub       what reaches it is limited to the rate, like a network
    rank 2 [eth0] ==veth==+   namespace of its own   card that sends and receives at the same time

The host's own network is not touched: interfaces and bridge live in the namespaces and go with them. Needs
root and iproute2. The kernel carries the data while ranks compute, so this is a real network to whoever
computes; latency is the kernel's own, some 50 microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

NAMESPACES = Path("/run/netns")
LABEL = "veth between network namespaces, rate-limited by tbf"
PREFIX = "mhcbench"
INTERFACE = "eth0"
LATENCY_SECONDS = 5e-5
CLONE_NEWNET = 0x40000000
MIN_RATE, MAX_RATE = 1e6, 2e9
"""Bits per second. Above, moving bytes keeps a processor busy, and compute would wait for it."""

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST_SECONDS, MIN_BURST_BYTES = 1e-3, 16 * 1024
"""What may leave at once after a pause, before the limit holds."""

QUEUE_SECONDS = 0.2


def parse_rate(text: str) -> float:
    """`500mbit`, `1gbit`, `2.5gbit` in bits per second. ValueError for anything else, and out of range."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.strip().lower())
    if match is None:
        raise ValueError(f"rate {text!r} is not a number with kbit, mbit or gbit, such as 1gbit.")
    rate = float(match[1]) * UNITS[match[2]]
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"rate {text} is outside 1mbit to 2gbit: above, moving bytes takes the processor that computes."
        )
    return rate


@dataclass(frozen=True)
class ShapedLink:
    """What the network does to a payload, for placing and for reports. Nothing is delayed by this object."""

    bits_per_second: float

    @property
    def latency_seconds(self) -> float:
        return LATENCY_SECONDS

    @property
    def bytes_per_second(self) -> float:
        return self.bits_per_second / 8

    def seconds(self, payload_bytes: int) -> float:
        """How long a payload occupies the link."""
        return LATENCY_SECONDS + payload_bytes / self.bytes_per_second


@dataclass
class ShapedNetwork:
    """`with ShapedNetwork(ranks, rate) as network:`, then in every rank's process `network.enter(rank)`.

    Taken down on leaving, whatever happened, SIGINT and SIGTERM included. What a killed process left behind
    is removed by the next one: names carry the process id.
    """

    num_ranks: int
    bits_per_second: float
    _made: list[str] = field(default_factory=list, init=False)
    _old_handler: Callable[[int, FrameType | None], Any] | int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.num_ranks <= 64:
            raise ValueError(f"num_ranks={self.num_ranks} must be from 2 to 64.")
        self._names = [f"{PREFIX}-{os.getpid()}-{rank}" for rank in range(self.num_ranks)]
        self._hub = f"{PREFIX}-{os.getpid()}-hub"

    @property
    def link(self) -> ShapedLink:
        return ShapedLink(self.bits_per_second)

    def enter(self, rank: int) -> None:
        """Move this process into the rank's namespace; before it has threads or connections.

        gloo finds the interface by GLOO_SOCKET_IFNAME, which is set here.
        """
        with (NAMESPACES / self._names[rank]).open() as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, f"cannot enter namespace {namespace.name}: {os.strerror(error)}")
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def __enter__(self) -> Self:
        check_available()
        _remove_left_behind()
        # A terminated bench must leave as one that fails: through __exit__.
        self._old_handler = signal.signal(signal.SIGTERM, _leave)
        with contextlib.ExitStack() as unless_built:
            unless_built.callback(self._take_down)
            self._build()
            unless_built.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._take_down()

    def _build(self) -> None:
        self._add(self._hub)
        _ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._hub, "link", "set", "bridge", "up")
        for rank, name in enumerate(self._names):
            port = f"rank{rank}"
            self._add(name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip(
                "-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name
            )
            _ip("-n", self._hub, "link", "set", port, "master", "bridge")
            _ip("-n", self._hub, "link", "set", port, "up")
            _ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            self._limit(self._hub, port)
            self._limit(name, INTERFACE)

    def _add(self, name: str) -> None:
        self._made.append(name)
        _ip("netns", "add", name)

    def slow_down(self, bits_per_second: float) -> None:
        """Limit what leaves this process's rank, which has entered, to less than the network's rate."""
        _run("tc", "qdisc", "change", "dev", INTERFACE, "root", "tbf", *_shape(bits_per_second))

    def _limit(self, namespace: str, interface: str) -> None:
        shape = _shape(self.bits_per_second)
        _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *shape)

    def _take_down(self) -> None:
        # A second Ctrl-C must not stop the removal halfway.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while self._made:
                name = self._made.pop()
                if (NAMESPACES / name).exists():
                    _ip("netns", "delete", name)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            if self._old_handler is not None:
                signal.signal(signal.SIGTERM, self._old_handler)
                self._old_handler = None


def check_available() -> None:
    """Raise ValueError that says what is missing."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"network namespaces need {' and '.join(missing)}, which this machine lacks. Install iproute2"
            " (apt-get install iproute2), or use the emulated link."
        )
    if os.geteuid() != 0:
        raise ValueError(
            f"network namespaces need root, and this is user {os.geteuid()}. Run as root, or use the emulated"
            " link."
        )


def _remove_left_behind() -> None:
    """Namespaces of benches that were killed: their process is gone."""
    if not NAMESPACES.is_dir():
        return
    for path in NAMESPACES.glob(f"{PREFIX}-*-*"):
        process = path.name.split("-")[1]
        if process.isdigit() and not Path("/proc", process).exists():
            try:
                _ip("netns", "delete", path.name)
            except ValueError:
                if path.exists():  # otherwise another bench was quicker
                    raise


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _shape(bits_per_second: float) -> list[str]:
    burst = max(MIN_BURST_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
    rate = f"{round(bits_per_second)}bit"
    return ["rate", rate, "burst", str(burst), "latency", f"{QUEUE_SECONDS * 1e3:g}ms"]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(
            f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}. Network namespaces need"
            " CAP_SYS_ADMIN and CAP_NET_ADMIN and a kernel with veth, bridge and tbf; without them, use the"
            " emulated link."
        )
