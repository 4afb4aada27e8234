"""This project's own executor: DualPipeV, phases placed by cost."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mhc_dist.bench.alone import Nobody
from mhc_dist.bench.pace import Nominal, Pace
from mhc_dist.bench.peers.engines import CPU, Setting
from mhc_dist.config import RunConfig
from mhc_dist.config_sections import RecomputeConfig
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.trace import Trace
from mhc_dist.pipeline.transport import GroupTransport
from mhc_dist.plan.layout import own_shapes


def with_recompute(config: RunConfig, mode: Literal["none", "mhc"]) -> RunConfig:
    return config.model_copy(
        update={"recompute": RecomputeConfig(mode=mode, block=config.recompute.block)}
    )


class Own:
    """An engine of the comparison."""

    def __init__(self, setting: Setting, pace: Pace, program: Program, mode: Literal["none", "mhc"]) -> None:
        config = with_recompute(setting.config, mode)
        topology = setting.topology
        places = own_shapes(config, 2 * topology.pipeline).places
        self._stage = Stage(
            config,
            [places[index] for index in setting.chunk_indices],
            setting.backend,
            setting.exchange,
            topology.expert_rank,
            CPU,
        )
        column = topology.pipeline_group_ranks
        self._nobody = Nobody()
        self._transport = GroupTransport(
            setting.groups.channels,
            dict(enumerate(column)),
            topology.rank,
            setting.streams_shape,
            next(self._stage.parameters()).dtype,
            CPU,
        )
        self._executor = Executor(
            topology.pipeline_rank,
            self._stage.by_index,
            self._transport,
            stretch=pace.stretch if isinstance(pace, Nominal) else None,
        )
        self._program, self._microbatches = program, setting.microbatches
        self.trace = Trace()

    def step(self) -> list[Tensor]:
        losses, self.trace = self._executor.run(self._program, self._microbatches, self._nobody)
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._stage.logical_parameters() if p.grad is not None}

    def forget_gradients(self) -> None:
        self._stage.zero_grad(set_to_none=True)
