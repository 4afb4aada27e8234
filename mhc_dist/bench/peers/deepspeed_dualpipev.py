"""DeepSpeed's own `DualPipeVEngine`, at its best settings.

fp32, no ZeRO, no activation checkpoints, no timers. Reduction and the optimizer's step are left out, as for
all engines of the comparison: it is about forwards and backwards. Everything else is the engine's own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from mhc_dist.bench.cell import Cell
from mhc_dist.bench.pace import Pace
from mhc_dist.bench.peers.layers import named_gradients, own_chunks

if not torch.cuda.is_available():
    # Otherwise DeepSpeed probes for devices and warns that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # type: ignore[import-untyped]
from deepspeed.ops import __compatible_ops__ as compatible_ops  # type: ignore[import-untyped]
from deepspeed.runtime.pipe import schedule  # type: ignore[import-untyped]
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule  # type: ignore[import-untyped]
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology  # type: ignore[import-untyped]

LEFT_OUT = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)


def _nothing(_engine: Any) -> None:
    """In place of what is left out."""


class DeepSpeedDualPipeV:
    """An engine of the comparison."""

    def __init__(self, cell: Cell, pace: Pace, *, hide_shared: bool) -> None:
        self._chunks = own_chunks(cell, pace, hide_shared=hide_shared)
        topology = cell.topology
        layers: list[nn.Module] = [
            self._chunks.get(index, nn.Identity()) for index in range(2 * topology.pipeline)
        ]
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Compiled for a minute at first use, and not needed: it is for reductions on one host.
        compatible_ops["deepspeed_shm_comm"] = False
        # The world is there already; this only tells DeepSpeed to use it, and who we are.
        rank, world_size = str(topology.rank), str(topology.world_size)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        num_microbatches = len(cell.microbatches)
        sequences = cell.config.data.sequences_per_microbatch
        with contextlib.redirect_stdout(io.StringIO()):
            module = DualPipeVModule(
                layers=layers,
                topology=PipeDataParallelTopology(num_pp=topology.pipeline, num_dp=topology.data),
                loss_fn=self._chunks[max(self._chunks)].loss,
                partition_method="uniform",
                activation_checkpoint_interval=0,
            )
            engine, *_ = deepspeed.initialize(
                model=module,
                # The engine insists on an optimizer; it is never stepped.
                optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
                config={
                    "train_micro_batch_size_per_gpu": sequences,
                    "gradient_accumulation_steps": num_microbatches,
                    "train_batch_size": sequences * num_microbatches * topology.data,
                    "steps_per_print": None,
                },
            )
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **dict.fromkeys(LEFT_OUT, _nothing)}
        engine._aggregate_total_loss = lambda: engine.total_loss  # no exchange of losses between data ranks
        self._engine, self._microbatches = engine, cell.microbatches
        # DeepSpeed has given all data ranks the first one's weights, experts included.
        for chunk in self._chunks.values():
            chunk.initialize(cell.config)

    def step(self) -> list[Tensor]:
        self._engine.train_batch(iter(self._microbatches))
        losses: list[Tensor] = self._engine.fwd_outputs
        return losses

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self._chunks.values())

    def forget_gradients(self) -> None:
        for chunk in self._chunks.values():
            chunk.zero_grad(set_to_none=True)
