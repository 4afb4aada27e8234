"""What phases cost on this machine, and a link that is as slow as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend

from mhc_dist.bench.alone import Nobody, random_microbatches
from mhc_dist.bench.cell import Mode
from mhc_dist.bench.routing import Rule, spread_evenly
from mhc_dist.bench.waiting import Waiting
from mhc_dist.config import RunConfig
from mhc_dist.optim.parameter_groups import cast_to_bf16
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import ActionKind, Program
from mhc_dist.pipeline.calibrate import calibrate
from mhc_dist.pipeline.cost import CostTable, MessageCost
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.perfetto import TraceEvent
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule, Op, OpKind
from mhc_dist.pipeline.trace import Event
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.layout import own_shapes
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import run_costs

LATENCY_SECONDS = 1e-4
LANE = "link"  # one for everything that leaves a rank
MICROBATCHES_ALONE, TURNS_ALONE = 2, 4

Key = tuple[int, str]
Payloads = dict[Key, float]
"""Bytes that one rank sends in the exchange of (chunk, item) for one microbatch."""


def machine_of(config: RunConfig) -> Machine:
    return Machine(load_cluster(config.schedule.cluster or "laptop"))


def costs_from(config: RunConfig, events: Sequence[Event]) -> CostTable:
    """Seconds of compute as `events` of a rank with all chunks have them; bytes as predicted."""
    compute = [
        TraceEvent(0, e.action, e.start, e.end, e.payload_bytes)
        for e in events
        if e.action.kind not in (ActionKind.ISSUE, ActionKind.WAIT)
    ]
    return calibrate(run_costs(config, machine_of(config)), compute)


def costs_alone(configs: Mapping[Mode, RunConfig], routing: Rule) -> dict[Mode, CostTable]:
    """Every phase of every chunk, timed in this process alone: no peers, all experts here, one thread.

    Modes take turns, so that what they cost can be compared: a processor is faster in one minute than in
    another by more than recomputation takes.
    """
    steps = {mode: _step_alone(config, routing) for mode, config in configs.items()}
    events: dict[Mode, list[Event]] = {mode: [] for mode in configs}
    for turn in range(1 + TURNS_ALONE):
        for mode, step in steps.items():
            found = step()
            if turn:  # the first one pays for what is allocated once
                events[mode] += found
    return {mode: costs_from(config, events[mode]) for mode, config in configs.items()}


def _step_alone(config: RunConfig, routing: Rule) -> Callable[[], list[Event]]:
    shapes = own_shapes(config)
    program = lower(_one_after_the_other(len(shapes.chunks)), shapes.chunks)
    exchange = ExpertExchange(config.model.num_experts)
    stage = Stage(
        config, shapes.places, make_backend(config.kernels.backend), exchange, 0, torch.device("cpu")
    )
    if config.train.precision == "bf16":
        cast_to_bf16(stage)
    if routing == "even":
        spread_evenly(stage)
    microbatches = random_microbatches(config)[:MICROBATCHES_ALONE]
    nobody = Nobody()
    executor = Executor(0, stage.by_index, nobody)

    def step() -> list[Event]:
        stage.zero_grad(set_to_none=True)
        return executor.run(program, microbatches, nobody).trace.events

    return step


def _one_after_the_other(num_chunks: int) -> CoarseSchedule:
    """Microbatch by microbatch on one rank, halves of backwards apart."""
    slots = []
    for microbatch in range(MICROBATCHES_ALONE):
        slots += [Op(OpKind.F, chunk, microbatch) for chunk in range(num_chunks)]
        for chunk in reversed(range(num_chunks)):
            slots += [Op(OpKind.I, chunk, microbatch), Op(OpKind.W, chunk, microbatch)]
    return CoarseSchedule("alone", MICROBATCHES_ALONE, (0,) * num_chunks, (tuple(slots),))


def payloads_of(events: Sequence[Event]) -> Payloads:
    """Mean bytes of every exchange, over `events` of all ranks; collective."""
    own: dict[Key, list[int]] = {}
    for event in events:
        if event.action.kind is ActionKind.ISSUE:
            own.setdefault((event.action.chunk, event.action.item), []).append(event.payload_bytes)
    gathered: list[dict[Key, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    together: dict[Key, list[int]] = {}
    for rank_payloads in gathered:
        for key, payloads in rank_payloads.items():
            together.setdefault(key, []).extend(payloads)
    return {key: sum(payloads) / len(payloads) for key, payloads in together.items()}


def stretched(costs: CostTable, times: float) -> CostTable:
    """Compute `times` as long."""
    return replace(
        costs,
        phases={
            key: replace(
                cost,
                forward=cost.forward * times,
                input_gradient=cost.input_gradient * times,
                weight_gradient=cost.weight_gradient * times,
                recompute=cost.recompute * times,
            )
            for key, cost in costs.phases.items()
        },
    )


def compute_seconds(costs: CostTable) -> float:
    """Forward and backward of one microbatch through the whole model, without recomputation."""
    return sum(c.forward + c.input_gradient + c.weight_gradient for c in costs.phases.values())


class SlowLink(Protocol):
    """What placement and reports need to know of a link."""

    @property
    def latency_seconds(self) -> float: ...
    @property
    def bytes_per_second(self) -> float: ...
    def seconds(self, payload_bytes: int) -> float: ...


def link_for(
    costs: CostTable, payloads: Payloads, program: Program, ratio: float, waiting: Waiting
) -> EmulatedLink:
    """A link on which all exchanges of a microbatch take `ratio` of its compute time.

    Raises ValueError when their latency alone takes longer.
    """
    issued = _issued(program)
    seconds = ratio * compute_seconds(costs) - len(issued) * LATENCY_SECONDS
    if seconds <= 0:
        raise ValueError(
            f"{len(issued)} exchanges of {LATENCY_SECONDS:g} s latency take longer than ratio={ratio:g} times"
            f" the compute of {compute_seconds(costs):.3g} s. Raise --ratio, or widen the model."
        )
    bytes_per_second = sum(payloads[key] for key in issued) / seconds
    return EmulatedLink(LATENCY_SECONDS, bytes_per_second, sleep=waiting.sleep)


def exchanges_seconds(program: Program, payloads: Payloads, link: SlowLink) -> float:
    """All exchanges of a microbatch, one after the other."""
    return sum(link.seconds(round(payloads[key])) for key in _issued(program))


def _issued(program: Program) -> list[Key]:
    """Exchanges of one microbatch, both directions."""
    return [
        (action.chunk, action.item)
        for actions in program.actions
        for action in actions
        if action.kind is ActionKind.ISSUE and action.microbatch == 0
    ]


def on_link(costs: CostTable, payloads: Payloads, link: SlowLink, message_bytes: int) -> CostTable:
    """`costs` with exchanges and messages as `link` carries them, one after the other."""
    exchanges = {}
    for key, cost in costs.exchanges.items():
        seconds = link.seconds(round(payloads[key]))
        exchanges[key] = replace(cost, forward=seconds, backward=seconds, lane=LANE)
    message = MessageCost(link.seconds(message_bytes), message_bytes, LANE)
    return replace(costs, exchanges=exchanges, message=message)
