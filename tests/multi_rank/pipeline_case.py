"""One step of a small model over several ranks, and the same step by the single-device model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from mhc_kernels.seam import make_backend
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from mhc_dist.config import RunConfig
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.model.moe import Experts, Router
from mhc_dist.parallel.boundary import message_shape
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.layout import chunk_places, chunk_shape
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.pipeline.transport import GroupTransport
from mhc_dist.pipeline.validate import validate
from mhc_dist.topology import Topology
from tests.small import random_sequences


class Gradients(NamedTuple):
    """Mean loss of the step (None on ranks that do not hold the last chunk) and gradients by logical name.

    Expert gradients are listed one by one, as `<path>.<expert>.<leaf>`.
    """

    loss: float | None
    by_name: dict[str, Tensor]


def _import_what_the_first_backward_imports() -> None:
    """Done before ranks are forked, so that each of them does not spend a second on it."""
    leaf = torch.ones(1, requires_grad=True)
    torch.autograd.backward([get_gradient_edge(leaf * 2)], [torch.ones(1)])


_import_what_the_first_backward_imports()


class NoStep:
    """The end of a step whose gradients are looked at, not applied."""

    def reduce(self) -> None: ...

    def step(self, losses: list[Tensor]) -> None: ...


def make_program(config: RunConfig) -> Program:
    schedule = make_schedule(config.schedule.name, config.parallel.pipeline, config.schedule.num_microbatches)
    places = chunk_places(config, schedule.chunk_rank)
    program = lower(schedule, tuple(chunk_shape(config, place) for place in places))
    validate(program)
    return program


def build_stage(config: RunConfig, program: Program, topology: Topology, groups: ProcessGroups) -> Stage:
    places = chunk_places(config, program.chunk_rank)
    own = [place for place in places if program.chunk_rank[place.index] == topology.pipeline_rank]
    exchange = ExpertExchange(
        config.model.num_experts, topology.expert, groups.expert_forward, groups.expert_backward
    )
    backend = make_backend(config.kernels.backend)
    return Stage(config, own, backend, exchange, topology.expert_rank, torch.device("cpu"))


def make_transport(config: RunConfig, topology: Topology, groups: ProcessGroups) -> GroupTransport:
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    shape = message_shape(config, dtype)
    peers = {stage: topology.rank_of(stage, topology.data_rank) for stage in range(topology.pipeline)}
    return GroupTransport(groups.channels, peers, topology.rank, shape, dtype, torch.device("cpu"))


def own_microbatches(config: RunConfig, topology: Topology, step: int = 0) -> list[Microbatch]:
    tokens, targets = random_sequences(config, step)
    rows = config.data.sequences_per_microbatch
    firsts = [
        (microbatch * topology.data + topology.data_rank) * rows
        for microbatch in range(config.schedule.num_microbatches)
    ]
    return [Microbatch(tokens[first : first + rows], targets[first : first + rows]) for first in firsts]


def make_hot(module: torch.nn.Module, experts: tuple[int, ...]) -> None:
    """Send every token of every layer to `experts`."""
    for child in module.modules():
        if isinstance(child, Router):
            child.bias_E[list(experts)] = 100.0


def rank_gradients(rank: int, config: RunConfig, hot_experts: tuple[int, ...] = ()) -> Gradients:
    """One step on this rank; gradients as autograd left them, not yet reduced over data ranks."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    program = make_program(config)
    groups = ProcessGroups.build(topology, links=program.links)
    stage = build_stage(config, program, topology, groups)
    make_hot(stage, hot_experts)
    executor = Executor(topology.pipeline_rank, stage.by_index, make_transport(config, topology, groups))
    output = executor.run(program, own_microbatches(config, topology), NoStep())
    loss = torch.stack(output.losses).mean().item() if output.losses else None
    return Gradients(loss, named_gradients(stage.by_index.values()))


def named_gradients(modules) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Gradients by logical name, stacked experts taken apart."""
    by_name: dict[str, Tensor] = {}
    for module in modules:
        stacked: dict[str, int] = {
            name: child.first_expert for name, child in module.named_modules() if isinstance(child, Experts)
        }
        for name, parameter in module.named_parameters():
            path = next((path for path in stacked if name.startswith(f"{path}.")), None)
            gradient = parameter.grad
            assert gradient is not None, f"{name} has no gradient"
            if path is None:
                by_name[name] = gradient
                continue
            for local, expert_gradient in enumerate(gradient):
                by_name[f"{path}.{stacked[path] + local}.{name[len(path) + 1 :]}"] = expert_gradient
    return by_name


def merge(config: RunConfig, ranks: list[Gradients]) -> Gradients:
    """What the optimizer has to see: the mean over data ranks, in float64.

    A rank without an expert contributes nothing to it: its tokens' share came through the exchange.
    """
    sums: dict[str, Tensor] = {}
    for gradients in ranks:
        for name, gradient in gradients.by_name.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + gradient.double()
    losses = [gradients.loss for gradients in ranks if gradients.loss is not None]
    assert len(losses) == config.parallel.data
    return Gradients(
        sum(losses) / len(losses), {name: total / config.parallel.data for name, total in sums.items()}
    )


def oracle_model(config: RunConfig) -> LanguageModel:
    model = LanguageModel(config, make_backend(config.kernels.backend))
    initialize(model, config)
    return model


def oracle_gradients(config: RunConfig, hot_experts: tuple[int, ...] = ()) -> Gradients:
    """The single-device model over the same global batch, sequence group by sequence group."""
    model = oracle_model(config)
    make_hot(model, hot_experts)
    tokens, targets = random_sequences(config)
    rows = config.data.sequences_per_microbatch
    parts = [(tokens[i : i + rows], targets[i : i + rows]) for i in range(0, len(tokens), rows)]
    total = 0.0
    for part in parts:
        loss = model(*part) / len(parts)
        loss.backward()
        total += loss.item()
    return Gradients(total, named_gradients([model]))
