"""A real, slow network between namespaces. Oracles: the rate, and the kernel's list of namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mhc_dist.bench.linked_group import BACKEND, Route, register
from mhc_dist.bench.namespaces import (
    NAMESPACES,
    PREFIX,
    ShapedLink,
    ShapedNetwork,
    check_available,
    parse_rate,
)
from tests.multi_rank.harness import RankFailedError

RATE = 1e8
PAYLOAD_BYTES = 2_500_000
"""0.2 s at the rate: long against what a busy machine adds."""


def unavailable() -> str:
    """Why namespaces cannot be had here; empty when they can."""
    try:
        check_available()
        with ShapedNetwork(2, RATE):
            return ""
    except ValueError as error:
        return str(error)


REASON = unavailable()
needs_namespaces = pytest.mark.skipif(bool(REASON), reason=f"NO NETWORK NAMESPACES HERE: {REASON}")


def own_namespaces() -> set[str]:
    if not NAMESPACES.is_dir():
        return set()
    return {path.name for path in NAMESPACES.glob(f"{PREFIX}-{os.getpid()}-*")}


def exchange(rank: int, network: ShapedNetwork, folder: Path) -> None:
    """Writes: seconds of an all-to-all that is waited for; seconds waited for one behind compute."""
    network.enter(rank)
    torch.set_num_threads(1)
    dist.init_process_group(register(Route()), init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert dist.get_backend() == BACKEND
    payload = torch.full((2 * PAYLOAD_BYTES,), rank, dtype=torch.uint8)
    square = torch.randn(128, 128)
    alone, exposed = [], []
    for _ in range(3):
        result = torch.empty_like(payload)
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(result, payload)
        alone.append(time.perf_counter() - start)
        assert result.view(2, -1).float().mean(1).tolist() == [0.0, 1.0]
        dist.barrier()
        start = time.perf_counter()
        work = dist.all_to_all_single(result, payload, async_op=True)
        while time.perf_counter() - start < 2 * network.link.seconds(PAYLOAD_BYTES):
            square @ square
        waiting = time.perf_counter()
        work.wait()
        exposed.append(time.perf_counter() - waiting)
    (folder / str(rank)).write_text(f"{min(alone)} {min(exposed)}")
    dist.barrier()
    dist.destroy_process_group()


@needs_namespaces
@pytest.mark.needs_root
def test_exchange_takes_the_time_of_the_rate_and_hides_behind_compute(tmp_path: Path) -> None:
    """Oracle: bytes over rate. Some may pass at once; other work on the machine only makes it longer."""
    with ShapedNetwork(2, RATE) as network:
        torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            exchange, (network, tmp_path), nprocs=2, start_method="fork"
        )
        want = network.link.seconds(PAYLOAD_BYTES)
    for rank in range(2):
        alone, exposed = map(float, (tmp_path / str(rank)).read_text().split())
        assert 0.9 * want < alone < 2.0 * want
        assert exposed < 0.2 * want
    assert not own_namespaces()


@needs_namespaces
@pytest.mark.needs_root
def test_nothing_is_left_when_what_runs_inside_fails() -> None:
    """Oracle: the kernel's list of namespaces."""

    def fail() -> None:
        with ShapedNetwork(2, RATE):
            assert len(own_namespaces()) == 3
            raise RankFailedError("a rank failed")

    with pytest.raises(RankFailedError):
        fail()
    assert not own_namespaces()


HOLD = """
import os, sys, time
from mhc_dist.bench.namespaces import ShapedNetwork
with ShapedNetwork(2, 1e8):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


@needs_namespaces
@pytest.mark.needs_root
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_one_that_was_ended(ended_by: signal.Signals) -> None:
    """Oracle: the kernel's list of namespaces. After SIGKILL the next network cleans up."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    pid = process.stdout.readline().strip()
    held = f"{PREFIX}-{pid}-*"
    assert len(list(NAMESPACES.glob(held))) == 3
    process.send_signal(ended_by)
    process.wait(timeout=30)
    process.stdout.close()
    if ended_by is signal.SIGKILL:
        assert list(NAMESPACES.glob(held))
        with ShapedNetwork(2, RATE):
            pass
    assert not list(NAMESPACES.glob(held))


@pytest.mark.parametrize(("text", "rate"), [("1gbit", 1e9), ("200mbit", 2e8), ("2.5Mbit", 2.5e6)])
def test_rates(text: str, rate: float) -> None:
    """Oracle: by hand, in bits per second."""
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "1", "1gib", "10gbit", "1kbit", "-1mbit"])
def test_rates_that_make_no_sense(text: str) -> None:
    """Oracle: the message names the text."""
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text)


def test_link_of_a_rate() -> None:
    """Oracle: bits over bytes, and the latency on top."""
    link = ShapedLink(8e6)
    assert link.seconds(500_000) == pytest.approx(0.5 + link.latency_seconds)


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a search path without them."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"ip and tc, which this machine lacks.*apt-get install iproute2"):
        check_available()


def test_wrong_number_of_ranks() -> None:
    """Oracle: the message has the number."""
    with pytest.raises(ValueError, match="num_ranks=1"):
        ShapedNetwork(1, RATE)
