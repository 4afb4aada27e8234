"""`torch.distributed.pipelining.ScheduleDualPipeV`, at its best settings.

Shapes are given, so nothing is inferred while it runs; outputs are not collected; receives are posted early
(`defer_pp_recv` would post them late). Pairs of forward and backward run one after the other, as the engine
does when nobody registers a function for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

from mhc_dist.bench.cell import CPU, Cell
from mhc_dist.bench.pace import Nominal, Pace
from mhc_dist.bench.peers.engines import streams_shape
from mhc_dist.bench.peers.layers import named_gradients, own_chunks
from mhc_dist.parallel.process_groups import create_group


class _PacedStage(PipelineStage):
    """Tells the pace which half of a backward runs: the engine splits some."""

    def __init__(self, pace: Nominal, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._pace = pace

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        if full_backward:
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        with self._pace.only_inputs():
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        if self.is_first:  # the engine puts the whole backward of the first stage off until here
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        with self._pace.weights(self.stage_index):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)


class TorchDualPipeV:
    """An engine of the comparison."""

    def __init__(self, cell: Cell, pace: Pace, *, hide_shared: bool) -> None:
        self._chunks = own_chunks(cell, pace, hide_shared=hide_shared)
        topology = cell.topology
        columns = [topology.at(rank).pipeline_group_ranks for rank in range(topology.data)]
        group = create_group(columns, topology.rank, cell.config.train.timeout_seconds)
        streams = torch.empty(streams_shape(cell), requires_grad=True)
        stages: list[Any] = []
        for index, chunk in self._chunks.items():
            place = (chunk, index, 2 * topology.pipeline, CPU)
            start = cell.microbatches[0].tokens if index == 0 else streams
            shapes: dict[str, Any] = {"input_args": (start,), "output_args": (streams,), "group": group}
            if isinstance(pace, Nominal):
                stages.append(_PacedStage(pace, *place, **shapes))
            else:
                stages.append(PipelineStage(*place, **shapes))
        last = self._chunks[max(self._chunks)]
        self._schedule = ScheduleDualPipeV(stages, len(cell.microbatches), loss_fn=last.loss)
        self._feeds = topology.pipeline_rank == 0
        self._tokens = torch.cat([microbatch.tokens for microbatch in cell.microbatches])
        self._targets = torch.cat([microbatch.targets for microbatch in cell.microbatches])

    def step(self) -> list[Tensor]:
        losses: list[Tensor] = []
        if self._feeds:
            self._schedule.step(self._tokens, target=self._targets, losses=losses, return_outputs=False)
        else:
            self._schedule.step(return_outputs=False)
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self._chunks.values())

    def forget_gradients(self) -> None:
        for chunk in self._chunks.values():
            chunk.zero_grad(set_to_none=True)
