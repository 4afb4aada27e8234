"""The ranks of a bench: processes joined by an emulated link, and steps of any program on them.

Two ways to compute. *Real*: phases last as long as they take, for at most as many ranks as cores. *Delay
mode*: every phase lasts its nominal time, its time in one process alone times a factor, on however many
ranks; results are computed all the same. Everything then runs in slow motion, exchanges too, since the link
is chosen by the nominal times. Ratios are those of real time; whether the processors kept up is measured
(`Overrun`).
"""

from __future__ import annotations

import json
import math
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from mhc_dist.bench.alone import Nobody, random_microbatches
from mhc_dist.bench.ended import RankEndedError
from mhc_dist.bench.linked_group import Route, register
from mhc_dist.bench.pace import Nominal
from mhc_dist.bench.routing import Rule, spread_evenly
from mhc_dist.bench.waiting import waiting_for
from mhc_dist.config import RunConfig
from mhc_dist.config_sections import RecomputeConfig
from mhc_dist.optim.parameter_groups import cast_to_bf16
from mhc_dist.parallel.boundary import STREAM_DTYPE, message_shape
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Action, Program
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.trace import Trace
from mhc_dist.pipeline.transport import GroupTransport
from mhc_dist.plan.layout import own_shapes
from mhc_dist.topology import Topology

Mode = Literal["none", "mhc", "full"]
Made = TypeVar("Made")
CPU = torch.device("cpu")


def with_recompute(config: RunConfig, mode: Mode) -> RunConfig:
    return config.model_copy(update={"recompute": RecomputeConfig(mode=mode, block=config.recompute.block)})


def message_bytes(config: RunConfig) -> int:
    """What one microbatch sends from chunk to chunk."""
    dtype = STREAM_DTYPE[config.train.precision]
    return math.prod(message_shape(config, dtype)) * dtype.itemsize


def run_ranks(measure: Callable[..., None], config: RunConfig, *arguments: Any) -> dict[str, Any]:
    """Start measure(rank, store, config, *arguments, result) on all ranks; returns what one wrote to result.

    Ranks are forked, so that they share what is imported already. A rank's ValueError, about what the user
    asked for, is raised as such; RankEndedError when one ended; anything else as ProcessRaisedException, with
    the rank's traceback.
    """
    # The first backward of a process imports for a second: done before the ranks part.
    leaf = torch.ones(1, requires_grad=True)
    torch.autograd.backward([get_gradient_edge(leaf * 2)], [torch.ones(1)])
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bench_", dir=memory) as folder:
        result, refused = Path(folder) / "figures.json", Path(folder) / "refused"
        ranks = start_processes(
            _run_rank,
            (measure, refused, f"{folder}/store", config, *arguments, result),
            nprocs=config.num_processes,
            join=False,
            start_method="fork",
        )
        try:
            while not ranks.join():
                pass
        except ProcessRaisedException as error:
            if refused.is_file():
                raise ValueError(refused.read_text()) from error
            raise
        except ProcessExitedException as error:
            raise RankEndedError(
                f"rank {error.error_index} of {config.num_processes} ended"
                f" ({error.signal_name or f'exit code {error.exit_code}'}) while it measured. Its own output"
                " says why; a SIGKILL without any is often the kernel, out of memory."
            ) from error
        finally:
            # Where a request to stop came: ranks that wait for each other do not end by themselves.
            for process in ranks.processes:
                process.kill()
                process.join()
        figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def _run_rank(rank: int, measure: Callable[..., None], refused: Path, *arguments: Any) -> None:
    # A request to stop goes to all processes: a rank just ends, what started it clears up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        measure(rank, *arguments)
    except ValueError as error:
        refused.write_text(str(error))
        raise


@dataclass(frozen=True)
class Cell:
    """One rank among the others."""

    config: RunConfig
    topology: Topology
    groups: ProcessGroups
    exchange: ExpertExchange
    route: Route
    microbatches: list[Microbatch]
    routing: Rule

    @classmethod
    def join(
        cls,
        rank: int,
        store: str,
        config: RunConfig,
        links: Iterable[tuple[int, int]],
        routing: Rule = "even",
        *,
        on_network: bool = False,
    ) -> Cell:
        """Collective. store: in a folder of this run. links: pairs of pipeline ranks that send each other
        messages. on_network: transfers go through sockets, not through memory.
        """
        torch.set_num_threads(1)
        world_size = config.num_processes
        route = Route(None if on_network else Path(store).parent, waiting=waiting_for(world_size))
        dist.init_process_group(
            register(route), init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        parallel = config.parallel
        topology = Topology(parallel.pipeline, parallel.data, parallel.expert, rank)
        groups = ProcessGroups.build(topology, config.train.timeout_seconds, links)
        exchange = ExpertExchange(
            config.model.num_experts, topology.expert, groups.expert_forward, groups.expert_backward
        )
        # Work makes figures, not text, so tokens are random.
        microbatches = random_microbatches(config, seed=topology.data_rank)
        return cls(config, topology, groups, exchange, route, microbatches, routing)

    def leave(self) -> None:
        """Collective: a rank that left early would look like a crash to the others."""
        dist.barrier()
        dist.destroy_process_group()

    def stage(self, config: RunConfig, program: Program) -> Stage:
        """This rank's chunks, in the run's number format."""
        own = [p for p in own_shapes(config).places if program.chunk_rank[p.index] == self._pipeline_rank]
        backend = make_backend(config.kernels.backend)
        stage = Stage(config, own, backend, self.exchange, self.topology.expert_rank, CPU)
        if config.train.precision == "bf16":
            cast_to_bf16(stage)
        if self.routing == "even":
            spread_evenly(stage)
        return stage

    @property
    def _pipeline_rank(self) -> int:
        return self.topology.pipeline_rank

    def runner(
        self,
        stage: Stage,
        program: Program,
        nominal: CostTable | None = None,
        link: EmulatedLink | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> Runner:
        """Runs `program` on `stage` over `link` (None: no delays); with `nominal`, in delay mode."""
        dtype = STREAM_DTYPE[self.config.train.precision]
        transport = GroupTransport(
            self.groups.channels,
            dict(enumerate(self.topology.pipeline_group_ranks)),
            self.topology.rank,
            message_shape(self.config, dtype),
            dtype,
            CPU,
        )
        stretch = None if nominal is None else Nominal(nominal).stretch
        executor = Executor(self._pipeline_rank, stage.by_index, transport, on_action, stretch=stretch)
        return Runner(stage, program, executor, self.microbatches, self.route, link, nominal is not None)

    def from_rank_0(self, value: Any) -> Any:
        """What rank 0 passes in; collective."""
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def made_by_rank_0(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on rank 0; the others, which share its cores, do not run it. Collective."""
        found: Made = self.from_rank_0(make() if self.topology.rank == 0 else None)
        return found

    def gather(self, value: Any) -> list[Any]:
        """What all ranks pass in, in rank order; collective."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
        return found


@dataclass(frozen=True)
class Runner:
    """Steps of one program on one rank, without reduction and optimizer."""

    stage: Stage
    program: Program
    executor: Executor
    microbatches: Sequence[Microbatch]
    route: Route
    link: EmulatedLink | None
    in_delay_mode: bool

    def step(self, *, keep_gradients: bool = False) -> tuple[float, Trace]:
        """One step: seconds until the last rank is through, and this rank's trace. Collective.

        Gradients are left in the parameters; keep_gradients adds them to those that are there.
        """
        if not keep_gradients:
            self.stage.zero_grad(set_to_none=True)
        nobody = Nobody()
        self.route.link = self.link
        dist.barrier()
        start = perf_counter()
        output = self.executor.run(self.program, self.microbatches, nobody)
        seconds = torch.tensor(perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds), output.trace

    def gradients(self) -> dict[str, Tensor]:
        """By the parameters' names in the whole model."""
        return {name: p.grad for name, p in self.stage.logical_parameters() if p.grad is not None}
