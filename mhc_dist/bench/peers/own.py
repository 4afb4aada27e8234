"""This project's own executor: DualPipeV, phases placed by cost."""

from __future__ import annotations

from torch import Tensor

from mhc_dist.bench.alone import Nobody
from mhc_dist.bench.cell import Cell
from mhc_dist.bench.pace import Nominal, Pace
from mhc_dist.bench.peers.engines import streams_shape
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.transport import GroupTransport


class Own:
    """An engine of the comparison."""

    def __init__(self, cell: Cell, pace: Pace, program: Program, stage: Stage) -> None:
        topology = cell.topology
        self._stage = stage
        parameter = next(self._stage.parameters())
        transport = GroupTransport(
            cell.groups.channels,
            dict(enumerate(topology.pipeline_group_ranks)),
            topology.rank,
            streams_shape(cell),
            parameter.dtype,
            parameter.device,
        )
        self._executor = Executor(
            topology.pipeline_rank,
            self._stage.by_index,
            transport,
            stretch=pace.stretch if isinstance(pace, Nominal) else None,
        )
        self._program, self._microbatches, self._nobody = program, cell.microbatches, Nobody()

    def step(self) -> list[Tensor]:
        return self._executor.run(self._program, self._microbatches, self._nobody).losses

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._stage.logical_parameters() if p.grad is not None}

    def forget_gradients(self) -> None:
        self._stage.zero_grad(set_to_none=True)
