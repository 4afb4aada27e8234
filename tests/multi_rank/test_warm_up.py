"""Oracle: Triton's rules for what is a kernel of its own, applied to launches before and in a first step.

A kernel that is compiled, and loaded, in mid-step holds up a rank for seconds on which others wait. Kernels
are recorded instead of run, so results are what memory held, and nothing is asked of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mhc_kernels.function_backend import FunctionBackend
from mhc_kernels.offline import RecordedLaunch, recorded_launches
from mhc_kernels.triton_backend import TritonOperations

import mhc_dist.worker
from mhc_dist.config import RunConfig
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.train import train_step
from mhc_dist.worker import Worker
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.test_training_parity import FixedBatches
from tests.small import small_config

ALIGNED_BYTES = 16

Variant = tuple[Any, ...]

MOVING_ROWS = {"unpermute_kernel", "unpermute_backward_kernel", "swiglu_kernel", "swiglu_backward_kernel"}
"""Kernels that only GPUs launch: elsewhere rows are moved by torch."""


def variant(launched: RecordedLaunch) -> Variant:
    """Equal for launches that Triton compiles once."""
    fixed = launched.kernel.do_not_specialize

    def described(name: str, value: Any) -> Any:
        match value:
            case torch.Tensor():
                return value.dtype, value.data_ptr() % ALIGNED_BYTES == 0
            case tuple():
                return tuple(described(name, one) for one in value)
            case int() if name in fixed:
                return int
            case float():
                return float
        return value  # a constant of the kernel, or a number that is taken for one

    described_arguments = tuple(described(name, value) for name, value in launched.arguments.items())
    return launched.kernel.__name__, described_arguments, tuple(launched.options.items())


def warm_up_on_a_played_gpu(worker: Worker) -> None:
    """As a rank on a GPU does it, but for where its tensors lie: here they only say so, then and later."""

    def at_home(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            *others, device = arguments
            assert device == worker.device
            function(*others, torch.device("cpu"))

        return call

    module, home = mhc_dist.worker, worker.device
    torch.Tensor.is_cuda = True  # type: ignore[misc, assignment]
    module.warm_up, module.warm_up_tokens = at_home(module.warm_up), at_home(module.warm_up_tokens)
    worker.device = torch.device("cuda", 0)
    worker.warm_up()
    worker.device = home


def compiled(rank: int, config: RunConfig, gpu: bool) -> tuple[set[Variant], set[Variant]]:
    """What this rank's warm-up compiles, and what a step needs."""
    mhc_dist.worker.make_backend = lambda name: FunctionBackend("triton", TritonOperations(), lambda _: None)
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    programs = plan_run(config)
    groups = ProcessGroups.build(topology, links=programs.training.links)
    worker = Worker.build(config, programs, topology, groups, torch.device("cpu"))
    with recorded_launches("sm_90") as before:
        if gpu:
            warm_up_on_a_played_gpu(worker)
        else:
            worker.warm_up()
    batches: Any = FixedBatches(config)
    with recorded_launches("sm_90") as within:
        train_step(worker, batches, 0)
    known = {variant(launched) for launched in before}
    return known, {variant(launched) for launched in within}


@pytest.mark.parametrize(
    ("precision", "residual", "recompute", "gpu"),
    [
        ("bf16", {}, "mhc", False),
        ("bf16", {"shifted_pre": True}, "mhc", False),
        ("fp32", {"kind": "residual", "num_streams": 1}, "none", True),
        pytest.param("fp32", {}, "mhc", True, marks=pytest.mark.long),
        pytest.param("bf16", {"kind": "mhc_lite"}, "none", False, marks=pytest.mark.long),
    ],
)
def test_no_kernel_is_compiled_in_a_step(
    precision: str, residual: dict[str, object], recompute: str, gpu: bool
) -> None:
    config = small_config(
        # A dense layer before the experts: its seams are regenerated with those of the next.
        model={"num_layers": 8, "num_dense_layers": 2, "num_shared_experts": 2},
        residual=residual,
        recompute={"mode": recompute, "block": "auto"},
        parallel={"pipeline": 2, "data": 1, "expert": 1},
        schedule={"name": "dualpipev", "num_microbatches": 4},
        train={"precision": precision},
    )
    for before, needed in run_ranks(2, compiled, config, gpu):
        names = {name for name, *_ in before}
        assert names & MOVING_ROWS == (MOVING_ROWS if gpu else set())
        assert (len(names - MOVING_ROWS) > 5) == (config.residual.kind != "residual")
        assert {name for name, *_ in needed - before} == set()
