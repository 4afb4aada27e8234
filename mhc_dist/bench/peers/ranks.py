"""One rank of the comparison: the same steps under every engine in turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.bench.calibrated import Settled, settle
from mhc_dist.bench.cell import Cell, Mode, message_bytes, with_recompute
from mhc_dist.bench.costs import Payloads, SlowLink, exchanges_seconds, machine_of
from mhc_dist.bench.namespaces import ShapedNetwork
from mhc_dist.bench.overrun import Overrun
from mhc_dist.bench.pace import Nominal, Pace, RealTime
from mhc_dist.bench.peak import PeakHeap
from mhc_dist.bench.peers.deepspeed_dualpipev import DeepSpeedDualPipeV
from mhc_dist.bench.peers.engines import Engine
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
from mhc_dist.bench.routing import Rule
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.lower import lower
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.run_costs import placed_program

MODES: tuple[Mode, Mode] = ("none", "mhc")
TOLERANCE, ROUNDING = 1e-5, 5e-8
"""Largest difference of a gradient between engines: TOLERANCE of its norm, and ROUNDING of the norm of all
gradients, since some are sums that nearly cancel."""


@dataclass(frozen=True)
class Plan:
    """What to measure. ratio: all-to-all over compute. slow_motion: nominal over measured time of compute,
    None computes in real time. network: namespaces to run in; None for an emulated link.
    """

    ratio: float
    rounds: int
    slow_motion: float | None
    routing: Rule
    network: ShapedNetwork | None = None


@dataclass
class _Turns:
    """What one engine has shown so far on this rank."""

    engine: Engine
    pace: Pace
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def measure(rank: int, store: str, config: RunConfig, plan: Plan, result: Path) -> None:
    """One rank. Rank 0 writes its figures to `result`."""
    if plan.network is not None:
        plan.network.enter(rank)
    links = lower(schedule_of(config), own_shapes(config).chunks).links
    on_network = plan.network is not None
    cell = Cell.join(rank, store, config, links, plan.routing, on_network=on_network)
    settled = settle(cell, MODES, plan.ratio, plan.slow_motion, plan.network)
    link, payloads = settled.link, settled.payloads
    turns = _engines(plan, cell, settled)
    # Before time is emulated: all engines compute the same, and how much they hold meanwhile.
    differences = check_equal({name: turn.engine for name, turn in turns.items()})
    for turn in turns.values():
        turn.peak_bytes = _peak_bytes(turn.engine)

    cell.route.link = settled.emulated
    for turn in turns.values():
        if isinstance(turn.pace, Nominal):
            turn.pace.running = True
    order = list(turns)
    for number in range(plan.rounds):
        shift = number % len(order)  # nobody always runs after the same neighbour
        for name in order[shift:] + order[:shift]:
            turns[name].seconds.append(_timed(turns[name].engine))

    everyones = cell.gather(differences)
    overruns = cell.gather({n: t.pace.overrun for n, t in turns.items() if isinstance(t.pace, Nominal)})
    overrun = {name: sum((of_rank[name] for of_rank in overruns), Overrun()) for name in overruns[0]}
    if rank == 0:
        figures = figures_of({name: Measured(t.seconds, t.peak_bytes) for name, t in turns.items()})
        figures |= {
            **_equality(everyones),
            "compute": "real" if plan.slow_motion is None else "nominal",
            "link": "emulated" if plan.network is None else "veth, tbf",
            "routing": plan.routing,
            "all_to_all_to_compute_ratio": plan.ratio,
            "message_to_all_to_all_ratio": _message_share(config, settled.plain["none"], payloads, link),
            "slow_motion": plan.slow_motion,
            **_overrun_figures(overrun),
            "link_bytes_per_second": link.bytes_per_second,
            "link_latency_seconds": link.latency_seconds,
            "pipeline": config.parallel.pipeline,
            "expert": config.parallel.expert,
            "num_microbatches": config.schedule.num_microbatches,
        }
        result.write_text(json.dumps(figures))
    cell.leave()


def _overrun_figures(overrun: Mapping[str, Overrun]) -> dict[str, Any]:
    """By engine, and of all of them as one; nothing of compute in real time."""
    total = sum(overrun.values(), Overrun())
    by_engine = {"overrun_shares": {name: one.share for name, one in overrun.items()}}
    return (total.figures() | by_engine if overrun else {}) | {"_overrun": asdict(total)}


def _message_share(config: RunConfig, program: Program, payloads: Payloads, link: SlowLink) -> float:
    """Time of all messages between pipeline ranks over time of all exchanges."""
    num_messages = len([a for actions in program.actions for a in actions if a.kind.value == "send"])
    per_microbatch = num_messages / program.num_microbatches
    return per_microbatch * link.seconds(message_bytes(config)) / exchanges_seconds(program, payloads, link)


def _engines(plan: Plan, cell: Cell, settled: Settled) -> dict[str, _Turns]:
    def make_pace(mode: Mode = "none") -> Pace:
        if plan.slow_motion is None:
            return RealTime()
        pace = Nominal(settled.costs[mode])
        pace.running = False
        return pace

    turns: dict[str, _Turns] = {}
    ours: tuple[tuple[str, Mode], ...] = ((OURS, "none"), (OURS_MHC, "mhc"))
    for name, mode in ours:
        config = with_recompute(cell.config, mode)
        costs = settled.costs[mode]
        program = cell.made_by_rank_0(partial(placed_program, config, machine_of(config), costs=costs))
        pace = make_pace(mode)
        turns[name] = _Turns(Own(cell, pace, program, settled.stages[mode]), pace)
    peers: tuple[tuple[str, Any, bool], ...] = (
        (DEEPSPEED, DeepSpeedDualPipeV, False),
        (TORCH, TorchDualPipeV, False),
        (DEEPSPEED_SHARED, DeepSpeedDualPipeV, True),
        (TORCH_SHARED, TorchDualPipeV, True),
    )
    for name, build, hide_shared in peers:
        if not hide_shared or cell.config.model.num_shared_experts:
            pace = make_pace()
            turns[name] = _Turns(build(cell, pace, hide_shared=hide_shared), pace)
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


@dataclass(frozen=True)
class Difference:
    """Where an engine's results are furthest from the first one's, in terms of their size."""

    what: str
    share: float

    @property
    def is_rounding(self) -> bool:
        return self.share <= TOLERANCE


def check_equal(engines: Mapping[str, Engine]) -> dict[str, Difference]:
    """Run every engine once; all losses and gradients must be those of the first. Returns how far they are.

    Raises RuntimeError that names the engine and what differs.
    """
    (first, reference), *others = engines.items()
    reference.forget_gradients()
    want_losses = [loss.detach() for loss in reference.step()]
    want = {name: gradient.clone() for name, gradient in reference.gradients().items()}
    furthest: dict[str, Difference] = {}
    for name, engine in others:
        engine.forget_gradients()
        losses = [loss.detach() for loss in engine.step()]
        got = engine.gradients()
        if len(losses) != len(want_losses) or got.keys() != want.keys():
            raise RuntimeError(
                f"{name} has other losses or gradients than {first}: {len(losses)} and {len(want_losses)}"
                f" losses, gradients of one alone: {sorted(got.keys() ^ want.keys())}"
            )
        found = [Difference(*one) for one in _differences(losses, want_losses, got, want)]
        # A difference that is not a number is no smaller than any other.
        worst = max(found, key=lambda one: (not one.is_rounding, one.share))
        if not worst.is_rounding:
            raise RuntimeError(
                f"{name} computes another {worst.what} than {first}: they differ by {worst.share:.2g} of its"
                f" size, more than {TOLERANCE:g}, so times say nothing."
            )
        furthest[name] = worst
    return furthest


def _equality(everyones: Sequence[Mapping[str, Difference]]) -> dict[str, Any]:
    """All ranks' differences as figures."""
    shares = {name: max(of_rank[name].share for of_rank in everyones) for name in everyones[0]}
    return {
        "gradients_equal": bool(shares) and all(share <= TOLERANCE for share in shares.values()),
        "largest_difference": shares,
        "tolerance": TOLERANCE,
    }


def _differences(
    losses: Sequence[Tensor],
    want_losses: Sequence[Tensor],
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
) -> list[tuple[str, float]]:
    found = [
        (f"loss of microbatch {number}", float((a - b).abs() / b.abs()))
        for number, (a, b) in enumerate(zip(losses, want_losses, strict=True))
    ]
    total = float(torch.stack([gradient.norm() for gradient in want.values()]).norm())
    for name, gradient in got.items():
        error, size = float((gradient - want[name]).norm()), float(want[name].norm())
        found.append((f"gradient of {name}", error / (size + ROUNDING / TOLERANCE * total)))
    return found
