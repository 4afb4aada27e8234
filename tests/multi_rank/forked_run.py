"""A whole run, `mhc_dist.train` on every rank, in forked processes that a test may kill.

Forking spares each rank the imports: a run of a dozen small steps takes seconds. Everything else is as a
launcher would do it: a port, rank variables, a config file in the run's folder.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mhc_dist.config import RunConfig, dump_config
from mhc_dist.train import main

END_SECONDS = 100.0
"""A run of these takes seconds; on a machine that does a dozen other things, a minute."""
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer {number}\n"


def write_corpus(folder: Path, num_files: int = 8) -> Path:
    """A folder of small text files, each of its own."""
    folder.mkdir(parents=True)
    for file in range(num_files):
        lines = (TEXT.format(number=(file + 3) * line * line % 1009) for line in range(60))
        (folder / f"{file}.txt").write_text("".join(lines))
    return folder


class ForkedRun:
    """The ranks of one start of a run. Not to be used while threads of this process hold locks."""

    def __init__(
        self,
        config: RunConfig,
        arguments: tuple[str, ...] = (),
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        """`prepare(rank)` is called in each rank before it starts: to break something."""
        config.folder.mkdir(parents=True, exist_ok=True)
        path = config.folder / "config.yaml"
        path.write_text(dump_config(config))
        (config.folder / "failure.json").unlink(missing_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        command = ("--config", str(path), *arguments)
        self.output = config.folder.with_name(f"{config.folder.name}.out")
        self.ranks: list[Any] = [
            fork.Process(
                target=_rank_main, args=(rank, config.num_processes, port, command, self.output, prepare)
            )
            for rank in range(config.num_processes)
        ]
        for rank in self.ranks:
            rank.start()

    def running(self) -> bool:
        return any(rank.is_alive() for rank in self.ranks)

    def wait(self) -> list[int]:
        """Exit codes; negated signals of what was killed. Ranks that do not end are killed and named."""
        deadline = time.monotonic() + END_SECONDS
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        stuck = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        for number in stuck:
            self.ranks[number].kill()
            self.ranks[number].join()
        assert not stuck, f"ranks {stuck} did not end within {END_SECONDS} s:\n{self.output.read_text()}"
        return [rank.exitcode for rank in self.ranks]

    def kill(self, rank: int) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        self.ranks[rank].kill()


def run_to_end(config: RunConfig, *arguments: str, prepare: Callable[[int], None] | None = None) -> None:
    run = ForkedRun(config, arguments, prepare)
    codes = run.wait()
    assert codes == [0] * len(codes), f"{codes}\n{run.output.read_text()}"


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    command: tuple[str, ...],
    output: Path,
    prepare: Callable[[int], None] | None,
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        MHC_DIST_REPORTED="1",
    )
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if prepare is not None:
        prepare(rank)
    code = main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
