"""One rank of the comparison: the same steps under every engine in turn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend
from torch import Tensor

from mhc_dist.bench.alone import random_microbatches
from mhc_dist.bench.linked_group import Route, register
from mhc_dist.bench.pace import Nominal, Pace, RealTime
from mhc_dist.bench.peak import PeakHeap
from mhc_dist.bench.peers.costs import (
    Mode,
    Payloads,
    costs_alone,
    costs_from,
    link_for,
    machine_of,
    on_link,
    payloads_of,
    stretched,
    with_recompute,
)
from mhc_dist.bench.peers.deepspeed_dualpipev import DeepSpeedDualPipeV
from mhc_dist.bench.peers.engines import Engine, Setting
from mhc_dist.bench.peers.figures import (
    DEEPSPEED,
    DEEPSPEED_SHARED,
    OURS,
    OURS_MHC,
    TORCH,
    TORCH_SHARED,
    Measured,
    figures_of,
)
from mhc_dist.bench.peers.own import Own
from mhc_dist.bench.peers.torch_dualpipev import TorchDualPipeV
from mhc_dist.config import RunConfig
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program
from mhc_dist.topology import Topology

MODES: tuple[Mode, Mode] = ("none", "mhc")
TOLERANCE = 1e-5
"""Largest difference of a gradient between engines, in terms of the parameter's largest gradient."""


@dataclass(frozen=True)
class Plan:
    """What to measure. ratio: all-to-all over compute. slow_motion: nominal over measured time of compute."""

    config: RunConfig
    compute: Literal["real", "nominal"]
    ratio: float
    rounds: int
    slow_motion: float


@dataclass
class _Turns:
    """What one engine has shown so far on this rank."""

    engine: Engine
    pace: Pace
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure(rank: int, store: str, plan: Plan, result: Path) -> None:
    """One rank. Rank 0 writes its figures to `result`."""
    torch.set_num_threads(1)
    config = plan.config
    world_size = config.num_processes
    # DeepSpeed insists on them although the world exists already.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    route = Route()
    dist.init_process_group(register(route), init_method=f"file://{store}", rank=rank, world_size=world_size)
    setting = _setting(config, rank)
    costs, payloads = _costs(plan, setting)
    shapes = own_shapes(with_recompute(config, "none"))
    plain = lower(schedule_of(config), shapes.chunks)
    link = link_for(costs["none"], payloads, plain, plan.ratio)
    route.link = link
    turns = _engines(plan, setting, costs, payloads, link)

    _check_equal({name: turn.engine for name, turn in turns.items()})
    order = list(turns)
    for number in range(plan.rounds):
        shift = number % len(order)  # nobody always runs after the same neighbour
        for name in order[shift:] + order[:shift]:
            turns[name].seconds.append(_timed(turns[name].engine))
    for turn in turns.values():
        turn.peak_bytes = _peak_bytes(turn.engine)
    if rank == 0:
        measured = {
            name: Measured(turn.seconds, turn.peak_bytes, _late_share(turn, plan))
            for name, turn in turns.items()
        }
        figures = figures_of(measured) | {
            "compute": plan.compute,
            "all_to_all_to_compute_ratio": plan.ratio,
            "slow_motion": plan.slow_motion if plan.compute == "nominal" else None,
            "link_bytes_per_second": link.bytes_per_second,
            "link_latency_seconds": link.latency_seconds,
            "ranks": world_size,
            "pipeline": config.parallel.pipeline,
            "expert": config.parallel.expert,
            "num_microbatches": config.schedule.num_microbatches,
        }
        result.write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def _setting(config: RunConfig, rank: int) -> Setting:
    topology = Topology(config.parallel.pipeline, config.parallel.data, config.parallel.expert, rank)
    groups = ProcessGroups.build(topology, config.train.timeout_seconds)
    exchange = ExpertExchange(
        config.model.num_experts, topology.expert, groups.expert_forward, groups.expert_backward
    )
    # Work makes figures, not text: random tokens spread over the experts as an untrained router sends them.
    microbatches = random_microbatches(config, seed=topology.data_rank)
    places = own_shapes(config).places
    return Setting(
        config, places, topology, groups, exchange, make_backend(config.kernels.backend), microbatches
    )


def _costs(plan: Plan, setting: Setting) -> tuple[dict[Mode, CostTable], Payloads]:
    """Compute per recompute mode, equal on all ranks, and what exchanges carry."""
    events = {}
    for mode in MODES:
        config = with_recompute(setting.config, mode)
        program = lower(schedule_of(config), own_shapes(config).chunks)
        warm = Own(setting, RealTime(), program, mode)
        warm.step()
        warm.step()
        events[mode] = warm.trace.events
    box: list[Any] = [None]
    if setting.topology.rank == 0:
        box[0] = {}
        for mode in MODES:
            config = with_recompute(setting.config, mode)
            if plan.compute == "real":
                box[0][mode] = costs_from(config, events[mode])
            else:
                box[0][mode] = stretched(costs_alone(config), plan.slow_motion)
    dist.broadcast_object_list(box)
    return box[0], payloads_of(events["none"])


def _engines(
    plan: Plan, setting: Setting, costs: Mapping[Mode, CostTable], payloads: Payloads, link: EmulatedLink
) -> dict[str, _Turns]:
    def pace(mode: Mode = "none") -> Pace:
        return Nominal(costs[mode]) if plan.compute == "nominal" else RealTime()

    tokens, streams, width = setting.streams_shape
    value_bytes = 4 if setting.config.train.precision == "fp32" else 2
    turns: dict[str, _Turns] = {}
    for name, mode in ((OURS, "none"), (OURS_MHC, "mhc")):
        config = with_recompute(setting.config, mode)
        table = on_link(costs[mode], payloads, link, tokens * streams * width * value_bytes)
        program = placed_program(config, machine_of(config), costs=table)
        own_pace = pace(mode)
        turns[name] = _Turns(Own(setting, own_pace, program, mode), own_pace)
    for name, build, hide_shared in (
        (DEEPSPEED, DeepSpeedDualPipeV, False),
        (TORCH, TorchDualPipeV, False),
        (DEEPSPEED_SHARED, DeepSpeedDualPipeV, True),
        (TORCH_SHARED, TorchDualPipeV, True),
    ):
        if hide_shared and not setting.config.model.num_shared_experts:
            continue
        own_pace = pace()
        turns[name] = _Turns(build(setting, own_pace, hide_shared=hide_shared), own_pace)
    return turns


def _timed(engine: Engine) -> float:
    """Seconds until the last rank is through."""
    engine.forget_gradients()
    dist.barrier()
    start = perf_counter()
    engine.step()
    seconds = torch.tensor(perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _peak_bytes(engine: Engine) -> int:
    """Most bytes that a rank holds during a step beyond weights: saved values, buffers, gradients."""
    engine.forget_gradients()
    dist.barrier()
    with PeakHeap() as peak:
        engine.step()
    largest = torch.tensor(peak.bytes)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _check_equal(engines: Mapping[str, Engine]) -> None:
    """Run every engine once; all losses and gradients must be those of the first.

    Raises RuntimeError that names the engine and the parameter. Collective: a rank that finds a difference
    ends the others too.
    """
    want: tuple[list[Tensor], dict[str, Tensor]] | None = None
    for name, engine in engines.items():
        engine.forget_gradients()
        losses = [loss.detach() for loss in engine.step()]
        gradients = engine.gradients()
        if want is None:
            want = losses, {key: gradient.clone() for key, gradient in gradients.items()}
            continue
        if gradients.keys() != want[1].keys():
            raise RuntimeError(f"{name} has other gradients: {sorted(gradients.keys() ^ want[1].keys())}")
        worst = max(_differences(losses, want[0], gradients, want[1]), key=lambda found: found[1])
        if not worst[1] <= TOLERANCE:
            raise RuntimeError(
                f"{name} computes another {worst[0]} than {next(iter(engines))}: they differ by {worst[1]:.2g}"
                f" of its largest value, more than {TOLERANCE:g}, so times say nothing."
            )


def _differences(
    losses: Sequence[Tensor],
    want_losses: Sequence[Tensor],
    gradients: Mapping[str, Tensor],
    want_gradients: Mapping[str, Tensor],
) -> list[tuple[str, float]]:
    assert len(losses) == len(want_losses), (len(losses), len(want_losses))
    pairs = [
        (f"loss of microbatch {i}", a, b) for i, (a, b) in enumerate(zip(losses, want_losses, strict=True))
    ]
    pairs += [(f"gradient of {key}", gradient, want_gradients[key]) for key, gradient in gradients.items()]
    return [
        (name, float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)))
        for name, got, want in pairs
    ]


def _late_share(turn: _Turns, plan: Plan) -> float:
    """Share of the measured time by which the processor missed nominal times."""
    if not isinstance(turn.pace, Nominal):
        return 0.0
    return turn.pace.late_seconds / (sum(turn.seconds) + 1e-30)
