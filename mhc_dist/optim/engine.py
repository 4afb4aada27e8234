"""The optimizer as the run drives it: main gradients in, steps out, and its state for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.optim.deepspeed_config import engine_config
from mhc_dist.optim.deepspeed_engine import FlatOptimizer, build_engine, check_contract
from mhc_dist.optim.engine_state import EngineState, FlatGroup, ParameterState, Partition
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.main_gradients import connect_parameters
from mhc_dist.optim.parameter_groups import cast_to_bf16, parameter_groups
from mhc_dist.optim.reduction import Clock, HostClock, Reduction, open_groups
from mhc_dist.optim.replicas import check_replicas
from mhc_dist.parallel.process_groups import create_group
from mhc_dist.topology import Topology


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


class OptimizerEngine:
    """Main gradients, reduction, clipping and AdamW for the parameters of one rank.

    `module` holds this rank's chunks, on their device, in fp32. With train.precision=bf16 it is cast in
    place, except parameters marked `keep_fp32` (flat buffers are per dtype, so both kinds live side by side).
    A rank may hold dense parameters only, experts only, or both.

    Building it and calling `reduce_gradients`, `finish_step`, `reduced_gradients`, `export_state` is
    collective over the world. Every parameter gets the attribute `gradient_sum()`: its fp32 main gradient,
    for whoever computes a weight gradient to add to; what autograd delivers instead is moved there by a
    hook, and `parameter.grad` stays None. `clock` times the waits for other ranks; by default the host's.
    """

    def __init__(
        self, module: nn.Module, config: RunConfig, topology: Topology, clock: Clock | None = None
    ) -> None:
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
        self._engine = build_engine(
            module,
            options,
            config,
            topology,
            self._groups,
            data_group,
            expert_data_group,
            clock or HostClock(),
        )
        optimizer: FlatOptimizer = self._engine.optimizer
        self._optimizer = optimizer
        self._flat_groups = [
            FlatGroup.of(parameters, group)
            for parameters, group in zip(self._groups, self._optimizer.real_dp_process_group, strict=True)
        ]
        self._main_gradients = connect_parameters(
            self._groups, optimizer.fp32_groups_gradients, lambda: optimizer.is_reduced
        )
        if drawn:
            self._set_masters(drawn)

    def _set_masters(self, drawn: Mapping[str, Tensor]) -> None:
        for partition in self.partitions():
            for fragment in partition.fragments:
                values = drawn[fragment.name].flatten()[fragment.start : fragment.stop]
                fragment.of(partition.master).copy_(values)

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
