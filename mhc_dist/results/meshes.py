"""What connecting a gloo group of the whole world costs: every rank with every other. Real processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch.distributed as dist

MOST_SECONDS = 120.0
"""For a world to connect, and for a rank to answer."""


def mesh_figures(worlds: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds, processor seconds of all ranks together and sockets of a rank, for each number of ranks."""
    return [_connected(world) for world in worlds]


def _connected(world: int) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # spawned ranks would spend their time importing torch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = [context.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, sender))
        for rank, (_, sender) in enumerate(ends)
    ]
    for process in ranks:
        process.start()
    try:
        figures = [_answer(receiver, rank, world) for rank, (receiver, _) in enumerate(ends)]
        for process in ranks:
            process.join(MOST_SECONDS)
    finally:
        for process in ranks:
            process.kill()
    return {
        "ranks": world,
        "seconds": max(of["seconds"] for of in figures),
        "processor_seconds": sum(of["processor_seconds"] for of in figures),
        "sockets_of_a_rank": max(of["sockets"] for of in figures),
    }


def _answer(receiver: Connection, rank: int, world: int) -> dict[str, Any]:
    if not receiver.poll(MOST_SECONDS):
        raise ValueError(
            f"rank {rank} of {world} processes on this machine has not connected after {MOST_SECONDS:g} s."
            " Measure while nothing else runs, on a machine with 100 MB of memory for each."
        )
    answer: dict[str, Any] = receiver.recv()
    return answer


def _rank(rank: int, world: int, port: int, sender: Connection) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=MOST_SECONDS),
    )
    dist.barrier()
    before = _num_sockets()
    start, processor_start = perf_counter(), process_time()
    dist.new_group(list(range(world)))
    seconds, processor_seconds = perf_counter() - start, process_time() - processor_start
    sockets = _num_sockets() - before
    dist.barrier()
    sender.send({"seconds": seconds, "processor_seconds": processor_seconds, "sockets": sockets})
    dist.barrier()
    dist.destroy_process_group()


def _num_sockets() -> int:
    folder = Path("/proc/self/fd")
    return sum(
        os.readlink(folder / name).startswith("socket:") for name in os.listdir(folder) if _is_open(name)
    )


def _is_open(name: str) -> bool:
    """The folder's own listing is an open file while it is read, and gone afterwards."""
    return os.path.lexists(f"/proc/self/fd/{name}")
