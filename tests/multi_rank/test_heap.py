"""Memory that a run holds between its steps."""

from __future__ import annotations

import gc

import pytest
import torch

from mhc_dist.bench.heap import heap_bytes
from mhc_dist.config import RunConfig
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.train import train_step
from mhc_dist.worker import Worker
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.test_training_parity import FixedBatches
from tests.small import small_config

NUM_WARM_STEPS = 150
"""In the first hundred steps something fills up once: half a megabyte."""
NUM_STEPS = 300
BYTES_PER_STEP = 1024
"""Some 300 are measured: what threads of the C library keep for their next use counts as allocated. Without
these caches (GLIBC_TUNABLES=glibc.malloc.tcache_count=0) nothing grows. Streams of a microbatch are 3 KB."""


def grown_bytes(rank: int, config: RunConfig) -> int:
    """How much more this rank holds on its heap after NUM_STEPS further steps."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    programs = plan_run(config)
    groups = ProcessGroups.build(topology, links=programs.training.links)
    worker = Worker.build(config, programs, topology, groups, torch.device("cpu"))
    batches, held = FixedBatches(config), 0
    for step in range(NUM_WARM_STEPS + NUM_STEPS):
        if step == NUM_WARM_STEPS:
            gc.collect()
            held = heap_bytes()
        train_step(worker, batches, step)  # type: ignore[arg-type]
    gc.collect()
    return heap_bytes() - held


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "mhc", "full"])
def test_steps_leave_nothing_behind(recompute: str) -> None:
    """Oracle: the C library's own count of allocated bytes."""
    config = small_config(
        model={"num_layers": 4, "num_dense_layers": 0, "hidden_size": 16, "expert_dim": 8},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": "dualpipev", "num_microbatches": 4, "cluster": "laptop"},
        recompute={"mode": recompute},
        train={"steps": NUM_WARM_STEPS + NUM_STEPS},
    )
    grown = run_ranks(4, grown_bytes, config, timeout_seconds=1200)
    print(f"recompute {recompute}: {[held / NUM_STEPS for held in grown]} bytes a step")
    assert max(grown) < NUM_STEPS * BYTES_PER_STEP, grown
