"""This project's own executor: DualPipeV, phases placed by cost."""

from __future__ import annotations

from torch import Tensor

from mhc_dist.bench.alone import Nobody
from mhc_dist.bench.pace import Nominal, Pace
from mhc_dist.bench.peers.costs import Mode, with_recompute
from mhc_dist.bench.peers.engines import CPU, Setting
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.trace import Trace
from mhc_dist.pipeline.transport import GroupTransport


class Own:
    """An engine of the comparison."""

    def __init__(self, setting: Setting, pace: Pace, program: Program, mode: Mode) -> None:
        topology = setting.topology
        self._stage = Stage(
            with_recompute(setting.config, mode),
            [setting.places[index] for index in setting.chunk_indices],
            setting.backend,
            setting.exchange,
            topology.expert_rank,
            CPU,
        )
        transport = GroupTransport(
            setting.groups.channels,
            dict(enumerate(topology.pipeline_group_ranks)),
            topology.rank,
            setting.streams_shape,
            next(self._stage.parameters()).dtype,
            CPU,
        )
        self._executor = Executor(
            topology.pipeline_rank,
            self._stage.by_index,
            transport,
            stretch=pace.stretch if isinstance(pace, Nominal) else None,
        )
        self._program, self._microbatches, self._nobody = program, setting.microbatches, Nobody()
        self.trace = Trace()

    def step(self) -> list[Tensor]:
        losses, self.trace = self._executor.run(self._program, self._microbatches, self._nobody)
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._stage.logical_parameters() if p.grad is not None}

    def forget_gradients(self) -> None:
        self._stage.zero_grad(set_to_none=True)
