"""The measurements: clocks, links between pairs, all-to-all, computing. Each has a limit in time.

Letters: seconds are of the monotonic clock, except for the clock skew, which compares wall clocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mhc_dist.preflight.communicator import Buffer, Communicator

SMALL_BYTES = 8
LARGE_BYTES = 8 << 20
ALL_TO_ALL_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 23)
"""What one rank sends to all others together."""
NUM_SMALL = 50
NUM_LARGE = 5
PAIR_BUDGET_SECONDS = 0.5
MATMUL_SIZE = 1024
COPY_BYTES = 64 << 20
COMPUTE_SECONDS = 0.5


@dataclass(frozen=True)
class PairLink:
    """One way between two ranks: half of the round trip."""

    first: int
    second: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class AllToAll:
    """Median over repetitions; `bytes_per_second` is what one rank sends to others."""

    total_bytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Compute:
    """One rank alone on its share of cores, or on its GPU."""

    fp32_flops: float
    bf16_flops: float
    copy_bytes_per_second: float


def clock_skew(world: Communicator, num_rounds: int = 20) -> list[float]:
    """Seconds by which every rank's wall clock is ahead of rank 0's; the fastest round trip decides."""
    stamp = np.zeros(1, dtype=np.float64)
    own = 0.0
    for other in range(1, world.size):
        if world.rank == 0:
            for _ in range(num_rounds):
                world.receive(_bytes(stamp), other)
                stamp[0] = time.time()
                world.send(_bytes(stamp), other)
        elif world.rank == other:
            best = float("inf")
            for _ in range(num_rounds):
                sent = time.time()
                world.send(_bytes(stamp), 0)
                world.receive(_bytes(stamp), 0)
                arrived = time.time()
                if arrived - sent < best:
                    best, own = arrived - sent, (sent + arrived) / 2 - float(stamp[0])
    return [float(skew) for skew in world.gather(own)]


def rounds_of_pairs(size: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair once; the pairs of a round have no rank in common (the circle method)."""
    ranks: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    for _ in range(len(ranks) - 1):
        half = len(ranks) // 2
        pairs = zip(ranks[:half], reversed(ranks[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        ranks = [ranks[0], ranks[-1], *ranks[1:-1]]


def pair_links(world: Communicator, limit_seconds: float) -> list[PairLink]:
    """Latency and bandwidth of all pairs, or of as many rounds as the time allows: at least one.

    Up to eight ranks one pair at a time; more of them in rounds of disjoint pairs, as in training.
    """
    deadline = time.monotonic() + limit_seconds
    own: list[PairLink] = []
    small, large = np.zeros(SMALL_BYTES, np.uint8), np.zeros(LARGE_BYTES, np.uint8)
    for pairs in rounds_of_pairs(world.size):
        for together in [[pair] for pair in pairs] if world.size <= 8 else [pairs]:
            world.barrier()
            for first, second in together:
                if world.rank in (first, second):
                    other = second if world.rank == first else first
                    latency = _one_way(world, small, other, NUM_SMALL)
                    seconds = _one_way(world, large, other, NUM_LARGE)
                    if world.rank == first:
                        rate = LARGE_BYTES / max(seconds - latency, 1e-9)
                        own.append(PairLink(first, second, latency, rate))
        # All stop after the same round.
        if any(world.gather(time.monotonic() > deadline)):
            break
    found = [link for links in world.gather(own) for link in links]
    return sorted(found, key=lambda link: (link.first, link.second))


def _one_way(world: Communicator, buffer: Buffer, other: int, most: int) -> float:
    """Median seconds one way over up to `most` round trips within the pair's budget."""
    begins = world.rank < other
    go_on = np.ones(1, np.uint8)
    samples: list[float] = []
    began = time.monotonic()
    # The first trip opens connections and is not counted.
    for number in range(most + 1):
        start = time.perf_counter()
        if begins:
            world.send(buffer, other)
            world.receive(buffer, other)
        else:
            world.receive(buffer, other)
            world.send(buffer, other)
        if number:
            samples.append((time.perf_counter() - start) / 2)
        # The one who began decides for both whether there is time for another.
        if begins:
            go_on[0] = time.monotonic() - began < PAIR_BUDGET_SECONDS or number < 2
            world.send(go_on, other)
        else:
            world.receive(go_on, other)
        if not go_on[0]:
            break
    return statistics.median(samples)


def all_to_alls(world: Communicator, num_repetitions: int = 5) -> list[AllToAll]:
    """All ranks exchange equal parts, at several sizes; seconds are those of the slowest rank."""
    found = []
    for total in ALL_TO_ALL_BYTES:
        part = max(1, total // world.size)
        sent, received = np.zeros(part * world.size, np.uint8), np.zeros(part * world.size, np.uint8)
        samples = []
        for _ in range(num_repetitions + 1):
            world.barrier()
            start = time.perf_counter()
            world.all_to_all(sent, received)
            samples.append(time.perf_counter() - start)
        seconds = max(world.gather(statistics.median(samples[1:])))
        found.append(AllToAll(total, seconds, part * (world.size - 1) / seconds))
    return found


def compute(device: torch.device) -> Compute:
    """Matrix products and copies on this rank's device, all ranks at the same time."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
        seconds = _seconds_each(lambda m=matrix: m @ m, device)
        rates[name] = 2 * MATMUL_SIZE**3 / seconds
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds_each(lambda: target.copy_(source), device)
    # A copy reads and writes.
    return Compute(rates["fp32"], rates["bf16"], 2 * COPY_BYTES / seconds)


def _seconds_each(work: object, device: torch.device) -> float:
    assert callable(work)
    samples: list[float] = []
    began = time.monotonic()
    while len(samples) < 3 or time.monotonic() - began < COMPUTE_SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def _bytes(array: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Buffer:
    return array.view(np.uint8)
