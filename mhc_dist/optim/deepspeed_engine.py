"""ZeRO-1 with fp32 masters, on top of DeepSpeed: the only file that knows it. `engine.py` drives it.

What DeepSpeed does here: it keeps parameters in flat buffers, one per parameter group, with an fp32 gradient
buffer over all of it and an fp32 master copy of this rank's partition; counts steps and feeds its monitors.
What is done in its place, and why:

* Gradients are reduced by one reduce-scatter per flat buffer. DeepSpeed all-reduces: twice the volume, plus
  two copies of every buffer. Updated parameters are gathered for all groups at once, not one by one.
* The gradient norm is taken over the partitions, which cover every parameter of the whole model exactly once,
  experts included: one sum over all ranks. DeepSpeed's own norm leaves out parameters without a gradient on
  this rank, so it differs between ranks (and then so does clipping) when an expert gets no tokens, and it
  needs a dense and an expert parameter on every rank, or hangs.
* The module is driven directly, never through `engine(...)`, whose hooks divide by the accumulation steps.
* Expert gradients are summed over the ranks with the same experts and divided by all data ranks: each rank
  of an expert group already holds the sum over the tokens of its group.

Private parts of DeepSpeed that this relies on are listed in `RELIED_ON` and checked at start.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.optim.adamw import FlatAdamW
from mhc_dist.optim.deepspeed_layout import DataParallelLayout
from mhc_dist.optim.gradient_norm import norm_of_whole_model
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import ParameterGroup
from mhc_dist.optim.reduction import Clock, Reduction, ReductionUnderWay
from mhc_dist.topology import Topology

if not torch.cuda.is_available():
    # Otherwise DeepSpeed probes for devices and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # type: ignore[import-untyped]
import deepspeed.runtime.bf16_optimizer as bf16_module  # type: ignore[import-untyped]
from deepspeed.ops import __compatible_ops__ as compatible_ops  # type: ignore[import-untyped]
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig  # type: ignore[import-untyped]
from deepspeed.runtime.engine import DeepSpeedEngine  # type: ignore[import-untyped]
from deepspeed.runtime.precision_config import DeepSpeedBF16Config  # type: ignore[import-untyped]

SHARED_MEMORY_OP = "deepspeed_shm_comm"
MUON_MODULE = "deepspeed.runtime.zero.muon.muon_optimizer"

RELIED_ON: tuple[tuple[object, tuple[str, ...]], ...] = (
    (
        DeepSpeedEngine,
        (
            "_configure_optimizer",
            "_broadcast_model",
            "_cast_module_mixed_precision",
            "_create_module_forward_pre_hook",
            "_create_module_forward_post_hook",
            "_take_model_step",
            "allreduce_gradients",
            "set_gradient_accumulation_boundary",
            "step",
            "destroy",
        ),
    ),
    (
        BF16_Optimizer,
        ("_setup_for_real_optimizer", "update_lp_params", "clear_hp_grads", "step", "zero_grad", "destroy"),
    ),
    (bf16_module, ("see_memory_usage",)),
    (deepspeed, ("init_distributed",)),
)
"""Private parts of DeepSpeed 0.19.8 that are overridden or called here."""

RELIED_ON_STATE = (
    "bf16_groups",
    "bf16_groups_flat",
    "bf16_partitioned_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_gradients",
    "fp32_groups_gradients_flat",
    "fp32_groups_gradient_flat_partition",
    "real_dp_process_group",
)
"""Attributes that a built BF16_Optimizer must have."""


def check_contract(
    parts: tuple[tuple[object, tuple[str, ...]], ...] = RELIED_ON,
) -> None:
    """Raise RuntimeError that names what this DeepSpeed lacks, before anything is built on it."""
    missing = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, names in parts
        for name in names
        if not hasattr(owner, name)
    ]
    if SHARED_MEMORY_OP not in compatible_ops:
        missing.append(f"deepspeed.ops.__compatible_ops__[{SHARED_MEMORY_OP!r}]")
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)}, which the optimizer engine relies"
            " on. Install deepspeed==0.19.8, the version it was written for."
        )


class FlatOptimizer(BF16_Optimizer):  # type: ignore[misc]
    """BF16_Optimizer's layout (flat parameters, fp32 masters and gradients), any dtype, own reduce and step.

    `reduce_groups[i]` replicates parameter group i; `data_size` is the number of data ranks to average over;
    `clock` times the waits for other ranks.
    """

    def __init__(
        self,
        basic: FlatAdamW,
        names: Mapping[nn.Parameter, str],
        reduce_groups: list[dist.ProcessGroup],
        data_size: int,
        clip: float,
        clock: Clock,
    ) -> None:
        self._reduce_groups = reduce_groups
        self._clock = clock
        self._data_size = data_size
        self._under_way: ReductionUnderWay | None = None
        self._awaited: ReductionUnderWay | None = None
        self.reduction = Reduction()
        self.is_reduced = False
        self.losses: Sequence[Tensor] = ()
        self.losses_finite = True
        self._global_grad_norm = 0.0
        self.waited_seconds = 0.0
        super().__init__(
            basic,
            names,
            # Its flag says "this optimizer keeps fp32 masters"; fp32 parameters work as well.
            bfloat16_config=DeepSpeedBF16Config(enabled=True),
            clip_grad=clip,
            dp_process_group=reduce_groups[0],
            grad_acc_dtype=torch.float32,
        )

    def _setup_for_real_optimizer(self) -> None:
        self.real_dp_process_group = self._reduce_groups
        super()._setup_for_real_optimizer()
        missing = [name for name in RELIED_ON_STATE if not hasattr(self, name)]
        if missing:
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__}: BF16_Optimizer lacks {', '.join(missing)}."
                " Install deepspeed==0.19.8."
            )

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Start the sums over replicas; each rank's partition receives its part, in place.

        Called by DeepSpeedEngine.allreduce_gradients.
        """
        assert not self.is_reduced, "gradients are already reduced"
        self.is_reduced = True
        self._under_way = ReductionUnderWay.start(
            self.fp32_groups_gradient_flat_partition,
            self.fp32_groups_gradients_flat,
            self.real_dp_process_group,
            self._clock,
        )

    def wait_for_reduction(self) -> None:
        if self._under_way is not None:
            self._under_way.wait()
            self._awaited, self._under_way = self._under_way, None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        assert self.is_reduced, "step before reduce_gradients"
        self.wait_for_reduction()
        gradients = self.fp32_groups_gradient_flat_partition
        # One host sync a step: clipping and skipping are decided here, the norm is reported.
        norm, self.losses_finite, self.waited_seconds = norm_of_whole_model(
            gradients, self.losses, self._data_size, self._clock
        )
        assert self._awaited is not None, "the reduction was awaited above"
        self.reduction = self._awaited.cost()
        self._global_grad_norm = norm
        self.overflow = not (math.isfinite(norm) and self.losses_finite)
        if self.overflow:
            return
        factor = 1.0 / self._data_size
        if self.clip_grad > 0:
            factor *= min(1.0, self.clip_grad / (norm + 1e-6))  # the 1e-6 of torch's clip_grad_norm_
        for master, gradient in zip(self.fp32_groups_flat_partition, gradients, strict=True):
            if factor != 1.0:
                gradient.mul_(factor)
            master.grad = gradient
        self.optimizer.step()
        self.update_lp_params()

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Round this rank's masters to the parameters' dtype and gather everyone's, all groups at once."""
        gathers = []
        for flat, partitions, master, group in zip(
            self.bf16_groups_flat,
            self.bf16_partitioned_groups,
            self.fp32_groups_flat_partition,
            self.real_dp_process_group,
            strict=True,
        ):
            own = partitions[dist.get_rank(group)]
            own.copy_(master)
            if own.numel() != flat.numel():
                gathers.append(dist.all_gather_single(flat, own, group=group, async_op=True))
        for gather in gathers:
            gather.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.clear_hp_grads()
        self.is_reduced = False


class _Engine(DeepSpeedEngine):  # type: ignore[misc]
    """DeepSpeedEngine around a module that is already cast, placed and equal on all replicas."""

    def _configure_optimizer(
        self, client_optimizer: Callable[[Any], FlatOptimizer], model_parameters: Any
    ) -> None:
        self.optimizer = client_optimizer(model_parameters)
        self.basic_optimizer = self.optimizer.optimizer

    def _create_module_forward_pre_hook(self) -> None:
        """None, so that a call of the module is a call of the module and nothing more."""

    def _create_module_forward_post_hook(self) -> None:
        """None, see above."""

    def _broadcast_model(self) -> None:
        """Replicas were compared by `check_replicas`; a broadcast over all data ranks would mix experts."""

    def _cast_module_mixed_precision(self, *arguments: Any, **options: Any) -> None:
        """Done before, so that parameters marked keep_fp32 are kept."""


def build_engine(
    module: nn.Module,
    options: dict[str, Any],
    config: RunConfig,
    topology: Topology,
    groups: Sequence[ParameterGroup],
    data_group: dist.ProcessGroup,
    expert_data_group: dist.ProcessGroup,
    clock: Clock,
) -> _Engine:
    """DeepSpeed's engine around `module` with a `FlatOptimizer` of `groups`, built from `options`."""
    optim, device = config.optim, groups[0].parameters[0].device
    # This op is compiled for a minute at first use, and a run killed meanwhile leaves a lock that hangs
    # every later run.
    compatible_ops[SHARED_MEMORY_OP] = False
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    layout = DataParallelLayout(topology, data_group)
    names = {
        parameter: name
        for group in groups
        for name, parameter in zip(group.names, group.parameters, strict=True)
    }
    basic = FlatAdamW(
        [
            {
                "params": list(group.parameters),
                "lr": learning_rate(optim, config.train.steps, 0),
                "weight_decay": optim.weight_decay if group.decays else 0.0,
            }
            for group in groups
        ],
        betas=optim.betas,
        eps=optim.eps,
    )
    reduce_groups = [expert_data_group if group.is_expert else data_group for group in groups]

    def build_optimizer(model_parameters: object) -> FlatOptimizer:
        with _lean_construction():
            return FlatOptimizer(basic, names, reduce_groups, topology.data, optim.gradient_clipping, clock)

    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        engine = _Engine(
            args=None,
            model=module,
            optimizer=build_optimizer,
            mpu=layout,
            config=options,
            config_class=DeepSpeedConfig(options, layout),
            dist_init_required=False,
            dont_change_device=True,
        )
    # Every step is a boundary: microbatches are counted by the schedule, not by DeepSpeed.
    engine.set_gradient_accumulation_boundary(True)
    return engine


@contextlib.contextmanager
def _lean_construction() -> Iterator[None]:
    """Spare BF16_Optimizer's constructor what takes seconds in every process and serves nothing here.

    It imports DeepSpeed's Muon optimizer, only to find that ours is another one, and with it torch's
    compiler; and it reports memory some ten times, each time after a full garbage collection.
    """
    muon = types.ModuleType(MUON_MODULE)
    muon.MuonWithAuxAdam = type("MuonWithAuxAdam", (), {})  # type: ignore[attr-defined]
    imported = sys.modules.get(MUON_MODULE)
    sys.modules[MUON_MODULE] = muon
    report, bf16_module.see_memory_usage = bf16_module.see_memory_usage, lambda *arguments, **options: None
    try:
        yield
    finally:
        bf16_module.see_memory_usage = report
        del sys.modules[MUON_MODULE]
        if imported is not None:
            sys.modules[MUON_MODULE] = imported
