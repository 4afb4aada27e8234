"""`mhc-dist bench checkpoint`: for how long saving stops training, at once and while it goes on.

A real run of a few ranks trains and saves; the two ways take turns within one run, on the same state:

    sync     every rank writes, syncs and commits before the next step
    async    every rank copies its state to host memory and goes on; a thread writes, syncs and commits

Stopped is the slowest rank's time. Steps made while a save is being written share processors and disk with
it; they are reported beside undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from mhc_dist.bench.alone import random_microbatches
from mhc_dist.bench.cell import run_ranks
from mhc_dist.bench.command import Bench, Outcome
from mhc_dist.checkpoint.folder import FOLDER
from mhc_dist.checkpoint.manifest import Progress
from mhc_dist.checkpoint.save import Saver
from mhc_dist.checkpoint.state import RankState
from mhc_dist.config import RunConfig
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.worker import Worker

CPU = torch.device("cpu")


class _Rank:
    """One rank of the run: steps and saves, timed."""

    def __init__(self, rank: int, store: str, config: RunConfig, folder: Path) -> None:
        torch.set_num_threads(1)
        world_size = config.num_processes
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        sizes = config.parallel
        topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
        programs = plan_run(config)
        seconds = config.train.timeout_seconds
        groups = ProcessGroups.build(
            topology, seconds, programs.training.links, save_seconds=config.checkpoint.timeout_seconds
        )
        self._worker = Worker.build(config, programs, topology, groups, CPU)
        state = RankState(self._worker.stage, self._worker.engine, topology, CPU)
        self.saver = Saver(config, folder / FOLDER, state, groups.checkpoints, "none", lambda *_, **__: None)
        self._microbatches = random_microbatches(config, seed=topology.data_rank)
        self._num_steps = 0
        self.num_bytes = sum(fragment.values.nbytes for fragment in state.to_save().values())

    def step(self) -> float:
        """One step; seconds of the slowest rank."""
        dist.barrier()
        start = perf_counter()
        worker = self._worker
        worker.executor.run(worker.programs.training, self._microbatches, worker)
        assert worker.take_outcome().applied
        self._num_steps += 1
        return self.slowest(perf_counter() - start)

    @property
    def progress(self) -> Progress:
        step = self._num_steps
        return Progress(step=step, num_updates=step, num_sequences=0, num_tokens=0)

    def slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.item()


def measure(rank: int, store: str, config: RunConfig, rounds: int, folder: Path, result: Path) -> None:
    """Alternate; the first round warms up files, memory and threads and is not counted."""
    this = _Rank(rank, store, config, folder)
    times: dict[str, list[float]] = {
        name: [] for name in ("sync", "async", "async_commit", "step", "step_while_writing")
    }
    for turn in range(rounds + 1):
        step = this.step()
        dist.barrier()
        saved = this.saver.save(this.progress, 0.0)
        stopped = this.slowest(saved.stopped_seconds)
        this.step()
        dist.barrier()
        start = perf_counter()
        this.saver.begin(this.progress, 0.0)
        copied = this.slowest(perf_counter() - start)
        meanwhile = this.step()
        outcome = this.saver.wait()
        assert outcome is not None
        for ended in (saved, outcome):
            if ended.failure is not None:
                raise ValueError(f"a save failed: {ended.failure}. Give --folder a disk with more space.")
        if turn:
            committed = this.slowest(outcome.seconds)
            for name, value in zip(times, (stopped, copied, committed, step, meanwhile), strict=True):
                times[name].append(value)
    num_bytes = torch.tensor(this.num_bytes)
    dist.all_reduce(num_bytes)
    if rank == 0:
        result.write_text(json.dumps(_figures(times, int(num_bytes), rounds)))
    dist.barrier()
    dist.destroy_process_group()


def _figures(times: dict[str, list[float]], num_bytes: int, rounds: int) -> dict[str, Any]:
    pairs = zip(times["async"], times["sync"], strict=True)
    return {
        "async_stop_ratio": median(copied / stopped for copied, stopped in pairs),
        "sync_stop_seconds": median(times["sync"]),
        "async_stop_seconds": median(times["async"]),
        "async_commit_seconds": median(times["async_commit"]),
        "step_seconds": median(times["step"]),
        "step_while_writing_seconds": median(times["step_while_writing"]),
        "checkpoint_bytes": num_bytes,
        "rounds": rounds,
        "seconds": times,
    }


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="timed saves of each kind (7)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench_checkpoint"), help="where to save; deleted afterwards"
    )


def _measure(config: RunConfig, options: argparse.Namespace) -> Outcome:
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds} must be at least 1.")
    if options.folder.exists():
        raise ValueError(f"--folder {options.folder} exists and would be deleted. Name another one.")
    try:
        figures = run_ranks(measure, config, options.rounds, options.folder)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    label = f"measured: {config.num_processes} ranks on this machine's processors and disk"
    return Outcome("checkpoint", label, figures, _table(figures))


def _table(figures: dict[str, Any]) -> str:
    megabytes = figures["checkpoint_bytes"] / 1e6
    return (
        f"{megabytes:.0f} MB: sync stops {figures['sync_stop_seconds']:.3f} s, async"
        f" {figures['async_stop_seconds']:.3f} s ({figures['async_stop_ratio']:.1%} of it, committed after"
        f" {figures['async_commit_seconds']:.3f} s)\n"
        f"a step takes {figures['step_seconds']:.3f} s, {figures['step_while_writing_seconds']:.3f} s while a"
        " save is being written"
    )


SETTINGS = (
    "schedule.num_microbatches=2",
    "schedule.cluster=null",
    "recompute.mode=none",
    "checkpoint.keep_last=1",
    "data.sequence_length=64",
    "model.num_experts=16",
    "model.expert_dim=512",
)
"""A state large enough that moving it counts, and short steps."""

BENCH = Bench("checkpoint", __doc__, _add_options, _measure, lambda options: SETTINGS)

if __name__ == "__main__":
    BENCH.main()
