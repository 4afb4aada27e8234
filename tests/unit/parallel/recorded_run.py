"""One rank's program, really executed, in one process: peers are a loopback, streams are recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.hazards import Entry
from mhc_dist.pipeline.recording import RecordedStreams, Recorder
from mhc_dist.pipeline.streams import HostStreams, Streams
from mhc_dist.pipeline.transport import GroupTransport
from mhc_dist.plan.run_programs import plan_run
from tests.small import random_sequences, small_config

NUM_PIPELINE_RANKS = 2
GROUP_SIZE = 2
FEWEST = {"dualpipev": 4, "zbv": 3}
"""Microbatches that fill two ranks, where two are too few."""


def recorded_config(
    schedule: str,
    recompute: str = "none",
    cluster: str | None = None,
    kind: str = "mhc",
    num_microbatches: int | None = None,
    group_size: int = GROUP_SIZE,
) -> RunConfig:
    """As small as a model with all kinds of phases can be; its program is placed if there is a cluster.

    group_size: ranks that share the experts; with one, nothing leaves it.
    """
    if num_microbatches is None:
        num_microbatches = FEWEST.get(schedule, 2)
    return small_config(
        model={
            "num_layers": 5,
            "num_dense_layers": 1,
            "hidden_size": 16,
            "num_experts": 4,
            "expert_dim": 4,
        },
        residual={"kind": kind, "num_streams": 1 if kind == "residual" else 4, "sinkhorn_iterations": 1},
        parallel={"pipeline": NUM_PIPELINE_RANKS, "data": GROUP_SIZE, "expert": group_size},
        schedule={"name": schedule, "num_microbatches": num_microbatches, "cluster": cluster},
        data={"sequence_length": 4},
        recompute={"mode": recompute, "block": 2},
    )


class _Over:
    def wait(self) -> bool:
        return True


@contextmanager
def loopback() -> Iterator[None]:
    """Transfers that read what is sent and write what is received, with values of their own making."""

    def all_to_all(result: Tensor, rows: Tensor, *sizes: Any, group: Any, async_op: bool) -> _Over:
        if rows.shape[0]:
            result.copy_(rows[torch.arange(result.shape[0]) % rows.shape[0]])
        else:
            result.zero_()
        return _Over()

    def isend(tensor: Tensor, peer: int, group: Any) -> _Over:
        tensor.clone()
        return _Over()

    def irecv(buffer: Tensor, peer: int, group: Any) -> _Over:
        buffer.copy_(torch.linspace(-1, 1, buffer.numel()).view_as(buffer))
        return _Over()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", all_to_all)
        patch.setattr(dist, "isend", isend)
        patch.setattr(dist, "irecv", irecv)
        patch.setattr(dist, "get_rank", lambda group: 0)
        yield


class _Reducer:
    """The end of a step: gradients go into the parameters, and the next step reads what this one wrote."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def reduce(self) -> None: ...

    @torch.no_grad()
    def step(self, losses: Sequence[Tensor] = ()) -> None:
        for parameter in self._stage.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad


def run_steps(
    config: RunConfig,
    rank: int,
    streams: Streams,
    num_steps: int = 1,
    prepare: Callable[[Stage], None] | None = None,
    on_action: Callable[[Action], None] | None = None,
) -> dict[str, Tensor]:
    """Parameters of pipeline rank `rank` after some steps; `prepare` is given the stage before the first."""
    group: Any = object()  # never looked into: transfers are a loopback
    exchange = ExpertExchange(config.model.num_experts, config.parallel.expert, group, group, streams)
    programs = plan_run(config)
    device = torch.device("cpu")
    stage = Stage(
        config, programs.places_of(rank), make_backend(config.kernels.backend), exchange, 0, device, streams
    )
    channels = {(a, b): group for a in range(NUM_PIPELINE_RANKS) for b in range(NUM_PIPELINE_RANKS)}
    num_tokens = config.data.sequences_per_microbatch * config.data.sequence_length
    shape = (num_tokens, config.residual.num_streams, config.model.hidden_size)
    peers = {peer: peer for peer in range(NUM_PIPELINE_RANKS)}
    transport = GroupTransport(channels, peers, rank, shape, torch.float32, device, streams)
    tokens, targets = random_sequences(config)
    microbatches = [
        Microbatch(tokens[i : i + 1], targets[i : i + 1]) for i in range(config.schedule.num_microbatches)
    ]
    executor = Executor(rank, stage.by_index, transport, on_action, streams=streams)
    if prepare is not None:
        prepare(stage)
    with loopback():
        for _ in range(num_steps):
            executor.run(programs.training, microbatches, _Reducer(stage))
    return {name: parameter.detach().clone() for name, parameter in stage.logical_parameters()}


def record(config: RunConfig, rank: int, num_steps: int = 1) -> tuple[list[Entry], dict[str, Tensor]]:
    """The log of some steps, and the parameters they led to."""
    recorder = Recorder()
    with recorder:
        parameters = run_steps(config, rank, RecordedStreams(recorder), num_steps)
    return recorder.log, parameters


def run_unrecorded(config: RunConfig, rank: int) -> dict[str, Tensor]:
    return run_steps(config, rank, HostStreams())
