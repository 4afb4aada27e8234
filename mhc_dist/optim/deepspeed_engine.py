"""The optimizer: ZeRO-1 with fp32 masters, run by DeepSpeed. The only file that knows DeepSpeed.

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
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.optim.adamw import FlatAdamW
from mhc_dist.optim.deepspeed_config import engine_config
from mhc_dist.optim.engine_state import EngineState, FlatGroup, ParameterState, Partition
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import cast_to_bf16, parameter_groups
from mhc_dist.optim.reduction import Reduction, ReductionUnderWay, open_groups
from mhc_dist.optim.replicas import check_replicas
from mhc_dist.parallel.process_groups import create_group
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


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did, the same on all ranks.

    `applied` is False when a loss or the gradient was not finite: nothing changed.
    """

    grad_norm: float
    learning_rate: float
    applied: bool
    losses_finite: bool
    reduction: Reduction


class _FlatOptimizer(BF16_Optimizer):  # type: ignore[misc]
    """BF16_Optimizer's layout (flat parameters, fp32 masters and gradients), any dtype, own reduce and step.

    `reduce_groups[i]` replicates parameter group i; `data_size` is the number of data ranks to average over.
    """

    def __init__(
        self,
        basic: FlatAdamW,
        names: Mapping[nn.Parameter, str],
        reduce_groups: list[dist.ProcessGroup],
        data_size: int,
        clip: float,
    ) -> None:
        self._reduce_groups = reduce_groups
        self._data_size = data_size
        self._under_way: ReductionUnderWay | None = None
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
        )

    def wait_for_reduction(self) -> None:
        if self._under_way is not None:
            self.reduction = self._under_way.wait()
            self._under_way = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None
        assert self.is_reduced, "step before reduce_gradients"
        self.wait_for_reduction()
        gradients = self.fp32_groups_gradient_flat_partition
        # One host sync a step: clipping and skipping are decided here, the norm is reported.
        norm = self._norm_of_whole_model(gradients)
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

    def _norm_of_whole_model(self, gradients: list[Tensor]) -> float:
        """Norm of the mean gradient of all parameters of all stages: partitions overlap nowhere.

        On the way it learns whether all losses of all ranks are finite.
        """
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        squares = torch.stack(norms).double().square().sum()
        bad_losses = squares.new_zeros(())
        for loss in self.losses:
            bad_losses += ~loss.isfinite().all()
        facts = torch.stack([squares, bad_losses])
        # The one point of a step where every rank waits for the slowest of all.
        start = time.perf_counter()
        dist.all_reduce(facts)
        total, num_bad_losses = facts.tolist()
        self.waited_seconds = time.perf_counter() - start
        self.losses_finite = num_bad_losses == 0
        return math.sqrt(total) / self._data_size

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
        self, client_optimizer: Callable[[Any], _FlatOptimizer], model_parameters: Any
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


class _Layout:
    """What DeepSpeed asks of its `mpu`: pipeline ranks are model parallel ranks, there is no tensor split."""

    def __init__(self, topology: Topology, data_group: dist.ProcessGroup) -> None:
        self._topology, self._data_group = topology, data_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._topology.data_group_ranks)

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data

    def get_model_parallel_rank(self) -> int:
        return self._topology.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._topology.pipeline

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1


class OptimizerEngine:
    """Main gradients, reduction, clipping and AdamW for the parameters of one rank.

    `module` holds this rank's chunks, on their device, in fp32. With train.precision=bf16 it is cast in
    place, except parameters marked `keep_fp32` (flat buffers are per dtype, so both kinds live side by side).
    A rank may hold dense parameters only, experts only, or both.

    Building it and calling `reduce_gradients`, `finish_step`, `reduced_gradients`, `export_state` is
    collective over the world. Every parameter gets the attribute `gradient_sum()`: its fp32 main gradient,
    for whoever computes a weight gradient to add to; what autograd delivers instead is moved there by a
    hook, and `parameter.grad` stays None.
    """

    def __init__(self, module: nn.Module, config: RunConfig, topology: Topology) -> None:
        check_contract()
        topology.check()
        topology.check_world_size(dist.get_world_size())
        options = engine_config(config)
        # Masters start from the weights as they were drawn, not from their rounding.
        drawn: dict[str, Tensor] = {}
        if config.train.precision == "bf16":
            drawn = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
            cast_to_bf16(module)
        self._config, self._topology = config, topology
        self._groups = parameter_groups(module.named_parameters())
        if not self._groups:
            raise ValueError(
                f"rank {topology.rank} has no trainable parameter: pipeline rank {topology.pipeline_rank} of"
                f" {topology.pipeline} got no layer. Lower parallel.pipeline or raise model.num_layers."
            )
        # Own communicators: a reduction must never queue behind an exchange of tokens.
        timeout = config.train.timeout_seconds
        data_group = create_group(topology.all_data_groups(), topology.rank, timeout)
        expert_data_group = create_group(topology.all_expert_data_groups(), topology.rank, timeout)
        check_replicas(self._groups, topology, data_group)
        open_groups([data_group, expert_data_group], self._groups[0].parameters[0].device)
        self._num_steps = 0
        self._engine = self._build(module, options, data_group, expert_data_group)
        self._optimizer: _FlatOptimizer = self._engine.optimizer
        self._flat_groups = [
            FlatGroup.of(parameters, group)
            for parameters, group in zip(self._groups, self._optimizer.real_dp_process_group, strict=True)
        ]
        self._main_gradients = self._connect_parameters()
        if drawn:
            self._set_masters(drawn)

    def _set_masters(self, drawn: Mapping[str, Tensor]) -> None:
        for partition in self.partitions():
            for fragment in partition.fragments:
                values = drawn[fragment.name].flatten()[fragment.start : fragment.stop]
                fragment.of(partition.master).copy_(values)

    def _build(
        self,
        module: nn.Module,
        options: dict[str, Any],
        data_group: dist.ProcessGroup,
        expert_data_group: dist.ProcessGroup,
    ) -> _Engine:
        optim, device = self._config.optim, self._groups[0].parameters[0].device
        # This op is compiled for a minute at first use, and a run killed meanwhile leaves a lock that hangs
        # every later run.
        compatible_ops[SHARED_MEMORY_OP] = False
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        layout = _Layout(self._topology, data_group)
        names = {
            parameter: name
            for group in self._groups
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }
        basic = FlatAdamW(
            [
                {
                    "params": list(group.parameters),
                    "lr": learning_rate(optim, self._config.train.steps, 0),
                    "weight_decay": optim.weight_decay if group.decays else 0.0,
                }
                for group in self._groups
            ],
            betas=optim.betas,
            eps=optim.eps,
        )
        reduce_groups = [expert_data_group if group.is_expert else data_group for group in self._groups]

        def build_optimizer(model_parameters: object) -> _FlatOptimizer:
            with _lean_construction():
                return _FlatOptimizer(
                    basic, names, reduce_groups, self._topology.data, optim.gradient_clipping
                )

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

    def _connect_parameters(self) -> dict[nn.Parameter, Tensor]:
        """Hook every parameter to its slice of the flat fp32 gradients."""
        main_gradients: dict[nn.Parameter, Tensor] = {}
        for group, slices in zip(self._groups, self._optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(group.parameters, slices, strict=True):
                main = gradient.view(parameter.shape)
                main_gradients[parameter] = main
                open_sum = self._opener(main)
                parameter.gradient_sum = open_sum  # type: ignore[attr-defined]

                def move(parameter: Tensor, open_sum: Callable[[], Tensor] = open_sum) -> None:
                    # None where the weight gradient went there already, or was put off: autograd visits the
                    # parameter all the same.
                    if parameter.grad is not None:
                        with torch.no_grad():
                            open_sum().add_(parameter.grad)
                        parameter.grad = None

                parameter.register_post_accumulate_grad_hook(move)
        return main_gradients

    def _opener(self, main: Tensor) -> Callable[[], Tensor]:
        optimizer = self._optimizer

        def open_sum() -> Tensor:
            assert not optimizer.is_reduced, "a gradient arrived after reduce_gradients and would be lost"
            return main

        return open_sum

    def main_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 gradient of a parameter of this rank, summed over the microbatches so far; a view.

        After `reduce_gradients` only this rank's partition of it means anything: see `reduced_gradients`.
        """
        return self._main_gradients[parameter]

    def reduce_gradients(self) -> None:
        """Start summing gradients over replicas. No gradient may arrive from now until `finish_step`."""
        self._engine.allreduce_gradients()

    def finish_step(self, losses: Sequence[Tensor] = ()) -> StepOutcome:
        """Reduce (if not begun), clip by the norm over the whole model, step, zero the main gradients.

        The mean over data ranks of what each accumulated is the gradient. A gradient that is not finite, or
        one of `losses` (this rank's, of the step) on any rank, leaves weights and moments as they are.
        """
        self._optimizer.losses = losses
        if not self._optimizer.is_reduced:
            self.reduce_gradients()
        rate = learning_rate(self._config.optim, self._config.train.steps, self._num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        self._num_steps += 1
        self._optimizer.losses = ()
        return StepOutcome(
            self._optimizer._global_grad_norm,
            rate,
            applied=not self._optimizer.overflow,
            losses_finite=self._optimizer.losses_finite,
            reduction=self._optimizer.reduction,
        )

    @property
    def waited_seconds(self) -> float:
        """How long the last `finish_step` waited for other ranks of the run to get there."""
        seconds: float = self._optimizer.waited_seconds
        return seconds

    def reduced_gradients(self) -> dict[str, Tensor]:
        """Mean gradients, unclipped and whole, by parameter name; between reduce and finish. For tests."""
        assert self._optimizer.is_reduced, "call reduce_gradients first"
        self._optimizer.wait_for_reduction()
        return {
            name: gradient / self._topology.data
            for flat_group, partition in zip(
                self._flat_groups, self._optimizer.fp32_groups_gradient_flat_partition, strict=True
            )
            for name, gradient in flat_group.gather(partition).items()
        }

    def export_state(self) -> EngineState:
        """Whole master weights and moments of this rank's parameters, by name; copies."""
        parameters: dict[str, ParameterState] = {}
        for flat_group, master in zip(
            self._flat_groups, self._optimizer.fp32_groups_flat_partition, strict=True
        ):
            adam = self._optimizer.optimizer.state_of(master)
            num_updates = int(adam["step"].item())
            masters = flat_group.gather(master.detach())
            first, second = flat_group.gather(adam["exp_avg"]), flat_group.gather(adam["exp_avg_sq"])
            for name in flat_group.names:
                parameters[name] = ParameterState(masters[name], first[name], second[name])
        return EngineState(self._num_steps, num_updates, parameters)

    def partitions(self) -> list[Partition]:
        """What this rank owns of masters and moments; the tensors the optimizer works on, not copies."""
        found = []
        for flat_group, master in zip(
            self._flat_groups, self._optimizer.fp32_groups_flat_partition, strict=True
        ):
            adam = self._optimizer.optimizer.state_of(master)
            fragments = flat_group.fragments(master.numel())
            found.append(Partition(fragments, master.detach(), adam["exp_avg"], adam["exp_avg_sq"]))
        return found

    @property
    def num_updates(self) -> int:
        """Steps that were applied; equal for all parameters."""
        master = self._optimizer.fp32_groups_flat_partition[0]
        return int(self._optimizer.optimizer.state_of(master)["step"].item())

    @torch.no_grad()
    def continue_from(self, num_steps: int, num_updates: int) -> None:
        """Take the partitions as they were after `num_steps` steps, of which `num_updates` were applied.

        Collective: every rank's rounded parameters are gathered anew from the masters.
        """
        for master in self._optimizer.fp32_groups_flat_partition:
            self._optimizer.optimizer.state_of(master)["step"].fill_(num_updates)
        self._optimizer.update_lp_params()
        self._num_steps = num_steps

    def write_monitors(self, values: Mapping[str, float], step: int) -> None:
        """Send figures to the monitors that the run switched on under `deepspeed:` (rank 0 writes)."""
        self._engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def close(self) -> None:
        """Give back what DeepSpeed holds. The process groups end with the world."""
        self._engine.destroy()


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
