"""Real processes, a real TCPStore, real kills: who is named, with which exit code, and how fast."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.liveness import this_process
from mhc_dist.guard.peers import PeerWatch
from mhc_dist.guard.signals import SignalInbox
from mhc_dist.guard.watch_limits import WatchLimits

LONGEST_SECONDS = 45.0
PEER_DIED = ExitCode.PEER_DIED.value


@dataclass
class RankContext:
    """What a rank's body gets."""

    rank: int
    world_size: int
    watch: PeerWatch
    store: TCPStore

    def say_ready(self) -> None:
        self.store.add("ready", 1)

    def block_in_cpp(self) -> None:
        """Wait where no Python code runs, as in a collective whose partner is gone."""
        self.store.wait(["never set"], timedelta(seconds=120))


TORCH_LOG = re.compile(r"\[W\d+ |frame #|Exception raised from|<omitting|$")

Body = Callable[[RankContext], None]


@dataclass
class Ranks:
    """Forked ranks under test; each writes its stderr into a file."""

    folder: Path
    body: Body
    world_size: int
    limits: WatchLimits = field(default_factory=lambda: WatchLimits(heartbeat_seconds=0.2))
    separate_hosts: bool = False
    absent: tuple[int, ...] = ()
    processes: list[ForkProcess] = field(default_factory=list)

    def start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=self._run, args=(rank, listener)) for rank in range(self.world_size)
        ]
        for process in self.processes:
            process.start()
        self.port = listener.getsockname()[1]
        listener.close()

    def _run(self, rank: int, listener: socket.socket) -> None:
        descriptor = os.open(self.folder / f"rank{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        os.dup2(descriptor, 1)
        if rank in self.absent:
            os._exit(0)
        inbox = SignalInbox()
        port = listener.getsockname()[1]
        if rank == 0:
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        else:
            listener.close()
            store = TCPStore("127.0.0.1", port, is_master=False)
        process = this_process()
        if self.separate_hosts:
            process = replace(process, host=f"node{rank}", pid_space=f"elsewhere {rank}")
        try:
            with PeerWatch(
                TCPStore("127.0.0.1", port, is_master=False),
                rank,
                self.world_size,
                inbox=inbox,
                limits=self.limits,
                process=process,
            ) as watch:
                self.body(RankContext(rank, self.world_size, watch, store))
        except Exception as error:
            os.write(2, f"own error: {error}\n".encode())
            os._exit(1)
        os._exit(0)

    def wait_until_ready(self) -> None:
        store = TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=60))
        deadline = time.monotonic() + 60
        while store.add("ready", 0) < self.world_size:
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.02)
        # Two heartbeats, so that everybody knows everybody's action.
        time.sleep(0.5)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def finish(self) -> list[int | None]:
        """Exit codes in order of ranks; anyone left after LONGEST_SECONDS is killed and shows as -9."""
        deadline = time.monotonic() + LONGEST_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def outputs(self) -> list[str]:
        """What each rank wrote, without the warnings of torch's own store client."""
        outputs = []
        for rank in range(self.world_size):
            lines = (self.folder / f"rank{rank}").read_text().splitlines(keepends=True)
            outputs.append("".join(line for line in lines if not TORCH_LOG.match(line)))
        return outputs


def sleep_in_main(context: RankContext) -> None:
    context.watch.report_action(f"wait.F c1 m{context.rank} dispatch")
    context.say_ready()
    time.sleep(120)


def block_in_main(context: RankContext) -> None:
    context.watch.report_action(f"wait.F c1 m{context.rank} dispatch")
    context.say_ready()
    context.block_in_cpp()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, victim: int) -> None:
    """Oracle: kill -9, of the store's host too: one line from each survivor, all naming the same rank."""
    ranks = Ranks(tmp_path, block_in_main, 4)
    ranks.start()
    ranks.wait_until_ready()
    pid = ranks.processes[victim].pid
    ranks.kill(victim)
    codes = ranks.finish()
    expected = [PEER_DIED] * 4
    expected[victim] = -signal.SIGKILL
    assert codes == expected, ranks.outputs()
    for rank, output in enumerate(ranks.outputs()):
        if rank == victim:
            assert output == ""
            continue
        assert re.fullmatch(
            rf"\[rank {rank}\] rank {victim} \(host {socket.gethostname()}, pid {pid}\) died: its process is"
            rf" gone\. Last known action: wait\.F c1 m{victim} dispatch, begun \d+\.\d s ago\."
            rf" This rank was in wait\.F c1 m{rank} dispatch for \d+\.\d s\."
            rf" Ending with exit code 81 \(PEER_DIED\)\.\n",
            output,
        ), output


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_on_another_machine_is_named(tmp_path: Path, victim: int) -> None:
    """Oracle: with processes hidden from each other only heartbeats and the store are left to tell."""
    limits = WatchLimits(heartbeat_seconds=0.2, silence_seconds=2.0)
    ranks = Ranks(tmp_path, block_in_main, 3, limits, separate_hosts=True)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(victim)
    codes = ranks.finish()
    for rank, output in enumerate(ranks.outputs()):
        if rank != victim:
            assert codes[rank] == PEER_DIED, ranks.outputs()
            assert output.count("\n") == 1
            assert f"rank {victim} (host node{victim}, pid" in output
            assert ("its store is gone" if victim == 0 else "no heartbeat for") in output


def test_a_suspended_rank_is_a_dead_one(tmp_path: Path) -> None:
    """Oracle: SIGSTOP keeps the process but ends its heartbeat; the others end and say so."""
    limits = WatchLimits(heartbeat_seconds=0.2, silence_seconds=2.0)
    ranks = Ranks(tmp_path, sleep_in_main, 3, limits)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(1, signal.SIGSTOP)
    for rank in (0, 2):
        ranks.processes[rank].join(LONGEST_SECONDS)
        assert ranks.processes[rank].exitcode == PEER_DIED
        assert "died: no heartbeat for" in ranks.outputs()[rank]
        assert "[rank 1]" not in ranks.outputs()[rank]
    ranks.kill(1)
    ranks.finish()


def test_a_store_that_never_answers_ends_the_run(tmp_path: Path) -> None:
    """Oracle: a suspended store host on another machine neither answers nor closes its connections."""
    limits = WatchLimits(heartbeat_seconds=0.2, silence_seconds=2.0)
    ranks = Ranks(tmp_path, sleep_in_main, 2, limits, separate_hosts=True)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(0, signal.SIGSTOP)
    ranks.processes[1].join(LONGEST_SECONDS)
    assert ranks.processes[1].exitcode == PEER_DIED
    assert "rank 0 (host node0" in ranks.outputs()[1]
    assert "its store has not answered for 2 s" in ranks.outputs()[1]
    ranks.kill(0)
    ranks.finish()


def host_store(listener: socket.socket) -> None:
    _ = TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    time.sleep(LONGEST_SECONDS)


def watch_with_a_store_elsewhere(port: int, folder: Path) -> None:
    def store() -> TCPStore:
        return TCPStore("127.0.0.1", port, is_master=False)

    def on_end(code: ExitCode, text: str) -> None:
        (folder / "word").write_text(f"{code.name}: {text}")

    with PeerWatch(store(), 0, 1, limits=WatchLimits(heartbeat_seconds=0.2), store_rank=None, on_end=on_end):
        (folder / "ready").touch()
        time.sleep(LONGEST_SECONDS)


def test_a_lost_store_that_no_rank_hosts_leaves_its_word(tmp_path: Path) -> None:
    """Oracle: torchrun's order of things, its agent hosting the store; exit code and what is left to read."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("fork")
    host = context.Process(target=host_store, args=(listener,))
    host.start()
    rank = context.Process(target=watch_with_a_store_elsewhere, args=(listener.getsockname()[1], tmp_path))
    rank.start()
    listener.close()
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    host.kill()
    host.join()
    rank.join(LONGEST_SECONDS)
    rank.kill()
    assert rank.exitcode == PEER_DIED
    assert (tmp_path / "word").read_text().startswith("PEER_DIED: the run's key-value store is gone (")


def fail_on_rank_0(context: RankContext) -> None:
    context.say_ready()
    if context.rank == 0:
        time.sleep(1.0)
        raise ValueError("expert 7 has -1 tokens\nsecond line")
    block_in_main(context)


def test_a_python_error_is_quoted_by_the_others(tmp_path: Path) -> None:
    """Oracle: the first line of the error in every survivor's message; the failing rank ends first."""
    ranks = Ranks(tmp_path, fail_on_rank_0, 3)
    ranks.start()
    pid = ranks.processes[0].pid
    codes = ranks.finish()
    assert codes == [1, PEER_DIED, PEER_DIED], ranks.outputs()
    for output in ranks.outputs()[1:]:
        assert f"pid {pid}) failed with ValueError: expert 7 has -1 tokens. This rank was in wait.F" in output
        assert "second line" not in output
        assert output.count("\n") == 1


def all_reduce_forever(context: RankContext) -> None:
    backend_store = PrefixStore("gloo", context.store)
    dist.init_process_group("gloo", store=backend_store, rank=context.rank, world_size=context.world_size)
    context.say_ready()
    value = torch.ones(1000)
    while True:
        context.watch.report_action("all_reduce")
        dist.all_reduce(value)


@pytest.mark.parametrize("separate_hosts", [False, True])
def test_errors_of_gloo_do_not_hide_who_died(tmp_path: Path, separate_hosts: bool) -> None:
    """Oracle: survivors' collectives raise at once (connection closed), yet all name the killed rank."""
    ranks = Ranks(tmp_path, all_reduce_forever, 4, separate_hosts=separate_hosts)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(3)
    codes = ranks.finish()
    assert codes == [PEER_DIED, PEER_DIED, PEER_DIED, -signal.SIGKILL], ranks.outputs()
    for output in ranks.outputs()[:3]:
        assert re.search(r"\] rank 3 \(host \S+ pid \d+\) died: .* Last known action: all_reduce", output)
        assert output.count("Ending with exit code") == 1
        assert "own error" not in output


def test_sigterm_after_a_death_does_not_hide_the_reason(tmp_path: Path) -> None:
    """Oracle: the launcher's order: one rank dies, the others get SIGTERM at once; all name the dead one."""
    ranks = Ranks(tmp_path, block_in_main, 4)
    ranks.start()
    ranks.wait_until_ready()
    for rank in (0, 1, 3):
        ranks.kill(rank, signal.SIGTERM)
    ranks.kill(2)
    codes = ranks.finish()
    assert codes == [PEER_DIED, PEER_DIED, -signal.SIGKILL, PEER_DIED], ranks.outputs()
    for rank in (0, 1, 3):
        assert f"[rank {rank}] rank 2 (host" in ranks.outputs()[rank]


def stop_when_asked(context: RankContext) -> None:
    context.say_ready()
    while context.watch.stop_reason is None:
        time.sleep(0.05)
    os.write(2, context.watch.stop_reason.encode())
    sys.exit(ExitCode.STOPPED)


def test_sigterm_alone_asks_every_rank_to_stop(tmp_path: Path) -> None:
    """Oracle: the signal reaches one rank, both learn of it and leave in order."""
    ranks = Ranks(tmp_path, stop_when_asked, 2)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(1, signal.SIGTERM)
    ranks.finish()
    assert ranks.outputs() == ["SIGTERM on rank 1"] * 2


def test_a_stop_that_is_not_followed_ends_the_process(tmp_path: Path) -> None:
    """Oracle: main threads blocked in C++ cannot react; the deadline ends them with the code for that."""
    limits = WatchLimits(heartbeat_seconds=0.2, stop_seconds=1.0)
    ranks = Ranks(tmp_path, block_in_main, 2, limits)
    ranks.start()
    ranks.wait_until_ready()
    ranks.kill(0, signal.SIGTERM)
    assert ranks.finish() == [ExitCode.STOPPED.value] * 2, ranks.outputs()
    for output in ranks.outputs():
        assert "stopped (SIGTERM on rank 0), but not in order within 1 s. This rank was in wait.F" in output


def one_rank_is_slow(context: RankContext) -> None:
    context.watch.report_action("load data", may_take_seconds=60)
    context.say_ready()
    time.sleep(2.5)
    context.watch.report_action("compute" if context.rank == 1 else f"recv from rank {context.rank - 1}")
    time.sleep(120)


def test_a_stuck_run_ends_with_a_dump(tmp_path: Path) -> None:
    """Oracle: no process is dead, so the limit on one action ends the run; a dump has all actions."""
    limits = WatchLimits(heartbeat_seconds=0.2, action_seconds=2.0)
    ranks = Ranks(tmp_path, one_rank_is_slow, 3, limits)
    start = time.monotonic()
    ranks.start()
    assert ranks.finish() == [ExitCode.STUCK.value] * 3, ranks.outputs()
    assert time.monotonic() - start > 4.5, "the longer limit of one action was not kept"
    dumps = [output for output in ranks.outputs() if output.count("\n") > 1]
    # Whoever finds out first tells it for all; ranks that find out at the same instant both do.
    assert dumps
    for dump in dumps:
        for rank, action in enumerate(["recv from rank -1", "compute", "recv from rank 1"]):
            assert re.search(rf"\n  rank {rank} \(host \S+ pid \d+\): {action} for \d+\.\d s", dump)
    for output in ranks.outputs():
        assert "no progress: rank" in output
        assert "2.0 s are allowed" in output
        assert output.endswith("Ending with exit code 82 (STUCK).\n")


def leave_one_by_one(context: RankContext) -> None:
    context.say_ready()
    time.sleep(0.4 * (context.world_size - context.rank if context.rank else 0))


def test_ranks_that_finish_are_not_missed(tmp_path: Path) -> None:
    """Oracle: ranks leave at different times, the store's host first: all end with 0 and say nothing."""
    limits = WatchLimits(heartbeat_seconds=0.2, silence_seconds=1.0)
    ranks = Ranks(tmp_path, leave_one_by_one, 4, limits)
    ranks.start()
    assert ranks.finish() == [0] * 4, ranks.outputs()
    assert ranks.outputs() == [""] * 4


def test_a_rank_that_never_joins_is_named(tmp_path: Path) -> None:
    """Oracle: a world of 2 of which only rank 0 comes."""
    limits = WatchLimits(heartbeat_seconds=0.2, join_seconds=1.0)
    ranks = Ranks(tmp_path, sleep_in_main, 2, limits, absent=(1,))
    ranks.start()
    assert ranks.finish() == [PEER_DIED, 0], ranks.outputs()
    assert "rank 1 never joined the run (waited 1 s)" in ranks.outputs()[0]


class DictStore:
    """All a PeerWatch needs of a store."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.content[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self.content[key]

    def add(self, key: str, amount: int, /) -> int:
        total = int(self.content.get(key, b"0")) + amount
        self.content[key] = str(total).encode()
        return total

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.content for key in keys)


def test_reporting_an_action_costs_next_to_nothing() -> None:
    """Oracle: a stopwatch: under 5 microseconds a call (measured: about 0.5).

    The best of ten turns counts: on a shared machine any single one may be interrupted.
    """
    num_calls = 2_000
    turns = []
    with PeerWatch(DictStore(), 0, 1) as watch:
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(num_calls):
                watch.report_action("compute")
            turns.append((time.perf_counter() - start) / num_calls)
    assert min(turns) < 5e-6
