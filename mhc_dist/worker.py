"""One rank's share of a run, put together: chunks, optimizer, executor, process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend
from mhc_kernels.warm_up import MAY_TAKE_SECONDS, may_take_seconds, variant, warm_up, warm_up_tokens
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.data.batches import Sequences
from mhc_dist.guard.stop import StopKind
from mhc_dist.model.count import dense_width
from mhc_dist.model.hyper_connection import ManifoldConnection
from mhc_dist.observe.stability import StabilityProbe
from mhc_dist.optim.engine import OptimizerEngine, StepOutcome
from mhc_dist.parallel.boundary import STREAM_DTYPE, message_shape
from mhc_dist.parallel.doing import Doing
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.process_groups import ProcessGroups, open_group
from mhc_dist.parallel.stage import Stage
from mhc_dist.parallel.wire_times import measure_wires
from mhc_dist.pipeline.action import Action
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.streams import make_streams
from mhc_dist.pipeline.transport import GroupTransport
from mhc_dist.plan.run_programs import RunPrograms
from mhc_dist.topology import Topology


class StepVerdict(NamedTuple):
    """What all ranks know alike after a step: its mean loss, and whether anyone was asked to stop."""

    loss: float
    stop: StopKind | None


@dataclass
class Worker:
    """Everything a training step needs on this rank. It is its executor's `StepEnd`."""

    config: RunConfig
    programs: RunPrograms
    topology: Topology
    groups: ProcessGroups
    device: torch.device
    stage: Stage
    engine: OptimizerEngine
    executor: Executor
    stability: StabilityProbe
    _outcome: StepOutcome | None = field(default=None, init=False)

    @classmethod
    def build(
        cls,
        config: RunConfig,
        programs: RunPrograms,
        topology: Topology,
        groups: ProcessGroups,
        device: torch.device,
        on_action: Callable[[object], None] | None = None,
    ) -> Worker:
        """Build this rank's chunks from the seed and connect them. Collective over the world.

        on_action: told everything this rank does before it does it; `str` of it says what it waits for.
        """
        streams = make_streams(device)
        exchange = ExpertExchange(
            config.model.num_experts, topology.expert, groups.expert_forward, groups.expert_backward, streams
        )
        stage = Stage(
            config,
            programs.places_of(topology.pipeline_rank),
            make_backend(config.kernels.backend),
            exchange,
            topology.expert_rank,
            device,
            streams,
        )
        engine = OptimizerEngine(stage, config, topology, streams)
        peers = {rank: topology.rank_of(rank, topology.data_rank) for rank in range(topology.pipeline)}
        num_tokens = config.data.sequences_per_microbatch * config.data.sequence_length
        dtype = STREAM_DTYPE[config.train.precision]
        shape = message_shape(config, dtype)
        transport = GroupTransport(groups.channels, peers, topology.rank, shape, dtype, device, streams)
        rows_bytes = num_tokens * config.model.num_active_experts * config.model.hidden_size * dtype.itemsize
        wires = measure_wires(
            groups.channels,
            [groups.expert_forward, groups.expert_backward],
            topology.rank,
            message_bytes=transport.message_bytes,
            exchange_bytes=rows_bytes * (topology.expert - 1) // topology.expert,
            device=device,
        )
        open_group(groups.data, device)  # routers are balanced over it

        def report(action: Action) -> None:
            if on_action is not None:
                on_action(Doing(action, topology))

        executor = Executor(
            topology.pipeline_rank, stage.by_index, transport, report, wires=wires, streams=streams
        )
        # The first data rank of a stage speaks for all: they have the same weights.
        every = config.observe.stability_every if topology.data_rank == 0 else 0
        stability = StabilityProbe(
            {index: chunk.tape_holder for index, chunk in stage.by_index.items()}, every
        )
        return cls(config, programs, topology, groups, device, stage, engine, executor, stability)

    @property
    def warm_up_seconds(self) -> float:
        """How long `warm_up` may take; 0 when there is nothing to compile."""
        limits = [may_take_seconds(block[0].backend) for block in self._blocks]
        if self.device.type == "cuda":
            limits.append(MAY_TAKE_SECONDS["triton"])
        return max(limits, default=0.0)

    def warm_up(self) -> None:
        """Compile what the first step would have to, on all ranks at once, and wait for the slowest.

        Collective over the world.
        """
        model, data = self.config.model, self.config.data
        num_tokens = data.sequences_per_microbatch * data.sequence_length
        dtype = STREAM_DTYPE[self.config.train.precision]
        warm: set[tuple[object, ...]] = set()
        for connections in self._blocks:
            block = [connection.seam_parameters() for connection in connections]
            if (kind := variant(block)) not in warm:
                warm.add(kind)
                warm_up(connections[0].backend, block, num_tokens, model.hidden_size, dtype, self.device)
        if self.device.type == "cuda":  # elsewhere rows are moved by torch
            shared = model.num_shared_experts * model.expert_dim
            widths = {dense_width(model), model.expert_dim, shared} - {0}
            warm_up_tokens(
                num_tokens, model.hidden_size, model.num_active_experts, widths, dtype, self.device
            )
        limit = timedelta(seconds=self.warm_up_seconds)
        dist.monitored_barrier(group=self.groups.control, timeout=limit)

    @property
    def _blocks(self) -> list[list[ManifoldConnection]]:
        """Connections that have seams to compile, block by block."""
        blocks = [
            [connection for connection in block if isinstance(connection, ManifoldConnection)]
            for chunk in self.stage.by_index.values()
            for block in chunk.connections_by_block()
        ]
        return [block for block in blocks if block]

    def microbatches(self, load: Callable[[int, int], Sequences]) -> list[Microbatch]:
        """This data rank's microbatches of a global batch, whose rows `load(first, count)` gives.

        Rows go to microbatches first and data ranks second, so that the global batch is the same on every
        topology of equal size.
        """
        rows = self.config.data.sequences_per_microbatch
        data, data_rank = self.topology.data, self.topology.data_rank
        microbatches = []
        for index in range(self.config.schedule.num_microbatches):
            sequences = load((index * data + data_rank) * rows, rows)
            microbatches.append(
                Microbatch(
                    torch.from_numpy(sequences.inputs).to(self.device),
                    torch.from_numpy(sequences.targets).to(self.device),
                )
            )
        return microbatches

    # The end of a training program

    def reduce(self) -> None:
        self.engine.reduce_gradients()

    def step(self, losses: Sequence[Tensor]) -> float:
        self._outcome = self.engine.finish_step(losses)
        return self.engine.waited_seconds

    def take_outcome(self) -> StepOutcome:
        """What the last optimizer step did."""
        assert self._outcome is not None, "no step was made"
        outcome, self._outcome = self._outcome, None
        return outcome

    def agree(self, losses: list[Tensor], stop: StopKind | None = None) -> StepVerdict:
        """Mean loss over all microbatches of all data ranks, and stop requests. Collective, one host sync."""
        mean = torch.stack(losses).double().mean().item() if losses else 0.0
        asked = [float(stop is kind) for kind in StopKind]
        facts = torch.tensor([mean, float(bool(losses)), *asked], dtype=torch.float64)
        dist.all_reduce(facts, group=self.groups.control)
        # Ranks hear of a request at different moments: it counts as soon as one has.
        heard = [kind for kind, count in zip(StopKind, facts[2:], strict=True) if count > 0]
        return StepVerdict(loss=(facts[0] / facts[1]).item(), stop=heard[-1] if heard else None)
