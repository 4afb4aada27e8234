"""Run a function on several ranks: forked processes, gloo, a file store, results back in rank order.

Forking takes a fraction of a second a rank because the children inherit the parent's imports; import what
the ranks need (DeepSpeed above all) at the top of the test module.
"""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankFailedError(AssertionError):
    """The first rank that failed, with its traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """Call `function(rank, *arguments)` in `world_size` processes that form one gloo process group.

    Returns what each rank returned (pickled), in rank order. The first failure is raised here as
    RankFailedError. Ranks still running after `timeout_seconds` are killed and TimeoutError names them.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder = Path(name)
        deadline = time.monotonic() + timeout_seconds
        fork = multiprocessing.get_context("fork")
        processes = [
            fork.Process(
                target=_rank_main, args=(rank, world_size, folder, timeout_seconds, function, arguments)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _join_all(processes, folder, deadline, timeout_seconds)
        finally:
            _kill(processes)
        _raise_first_failure(folder, processes)
        return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout_seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world_size,
            # Longer than the deadline of `run_ranks`: a rank that waits in vain is to be killed and named
            # there, never to report a failure of its own in a race with that deadline.
            timeout=datetime.timedelta(seconds=timeout_seconds + 60.0),
        )
        _write_result(folder, rank, function, arguments)
    except BaseException:
        # Written before the process group goes: its end makes the peers fail too.
        _write(folder / f"failure_{time.monotonic_ns():020d}_{rank}", traceback.format_exc().encode())
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _write_result(folder: Path, rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    result = function(rank, *arguments)
    # Leaving while a peer still reads from this rank would look to it like a crash.
    dist.barrier()
    _write(folder / f"result_{rank}", pickle.dumps(result))


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f"partial_{path.name}")
    partial.write_bytes(content)
    partial.rename(path)


def _failures(folder: Path) -> list[Path]:
    return sorted(folder.glob("failure_*"))


def _join_all(processes: list[Any], folder: Path, deadline: float, timeout_seconds: float) -> None:
    """Wait for all ranks; once one has failed the others get two seconds, since they may wait for it."""
    while running := [rank for rank, process in enumerate(processes) if process.is_alive()]:
        failed = bool(_failures(folder)) or any(process.exitcode not in (None, 0) for process in processes)
        if failed:
            deadline = min(deadline, time.monotonic() + 2.0)
        if time.monotonic() > deadline:
            if failed:
                return
            raise TimeoutError(f"ranks {running} of {len(processes)} still ran after {timeout_seconds} s")
        multiprocessing.connection.wait([processes[rank].sentinel for rank in running], timeout=0.05)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def _raise_first_failure(folder: Path, processes: list[Any]) -> None:
    failures = _failures(folder)
    if failures:
        rank = int(failures[0].name.rsplit("_", 1)[1])
        raise RankFailedError(f"rank {rank} failed first:\n{failures[0].read_text()}")
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            raise RankFailedError(
                f"rank {rank} ended with exit code {process.exitcode} and left no traceback"
            )
