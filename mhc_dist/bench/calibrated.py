"""Costs of a bench's compute as the ranks themselves show it, on the link that the bench is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from mhc_dist.bench.cell import Cell, Mode, Runner, message_bytes, with_recompute
from mhc_dist.bench.costs import (
    Payloads,
    SlowLink,
    costs_alone,
    costs_from,
    link_for,
    on_link,
    payloads_of,
    stretched,
)
from mhc_dist.bench.namespaces import ShapedLink, ShapedNetwork
from mhc_dist.config import RunConfig
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.calibrate import calibrate, jitter_of
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.perfetto import TraceEvent
from mhc_dist.pipeline.trace import Event
from mhc_dist.plan.layout import own_shapes, schedule_of

NUM_STEPS = 2


def on_loopback(
    cell: Cell, configs: Mapping[Mode, RunConfig], runners: Mapping[Mode, Runner], slow_motion: float | None
) -> tuple[dict[Mode, CostTable], Payloads]:
    """Seconds of compute by recompute mode, equal on all ranks, and bytes of exchanges, which are the same in
    all modes, before any link slows them down. Collective.

    runners: of the plain lowering, without a link. slow_motion: None for phases as they last here; otherwise
    those of one process alone, times so much.
    """
    events = {mode: runner.step()[1].events for mode, runner in runners.items()}
    payloads = payloads_of(next(iter(events.values())))
    if slow_motion is not None:
        alone = cell.made_by_rank_0(lambda: costs_alone(configs, cell.routing))
        return {mode: stretched(costs, slow_motion) for mode, costs in alone.items()}, payloads
    # The first steps have paid for what is allocated once.
    events = {mode: [] for mode in runners}
    for _ in range(NUM_STEPS):
        for mode, runner in runners.items():
            events[mode] += runner.step()[1].events
    return cell.made_by_rank_0(lambda: {m: costs_from(configs[m], events[m]) for m in events}), payloads


@dataclass(frozen=True)
class Settled:
    """What `settle` found. costs: per recompute mode. emulated: what holds transfers back, None where the
    network itself is slow.
    """

    stages: dict[Mode, Stage]
    plain: dict[Mode, Program]
    costs: dict[Mode, CostTable]
    payloads: Payloads
    link: SlowLink
    emulated: EmulatedLink | None


def settle(
    cell: Cell,
    modes: Sequence[Mode],
    ratio: float,
    slow_motion: float | None,
    network: ShapedNetwork | None,
) -> Settled:
    """Choose the link on which exchanges take `ratio` of the compute, and measure costs on it. Collective.

    From here on `network` is slow, an emulated link only for those who use it.
    """
    configs = {mode: with_recompute(cell.config, mode) for mode in modes}
    plain = {mode: lower(schedule_of(own), own_shapes(own).chunks) for mode, own in configs.items()}
    stages = {mode: cell.stage(own, plain[mode]) for mode, own in configs.items()}
    runners = {mode: cell.runner(stage, plain[mode]) for mode, stage in stages.items()}
    compute, payloads = on_loopback(cell, configs, runners, slow_motion)
    emulated = link_for(compute[modes[0]], payloads, plain[modes[0]], ratio, cell.route.waiting)
    link: SlowLink = emulated
    if network is not None:
        link = ShapedLink(8 * emulated.bytes_per_second)
        network.slow_down(link.bits_per_second)
    held_back = emulated if network is None else None
    costs = {}
    for mode, stage in stages.items():
        on = on_link(compute[mode], payloads, link, message_bytes(cell.config))
        nominal = None if slow_motion is None else on
        costs[mode] = calibrated(cell, on, cell.runner(stage, plain[mode], nominal, held_back))
    cell.route.link = None
    return Settled(stages, plain, costs, payloads, link, held_back)


def calibrated(cell: Cell, costs: CostTable, runner: Runner) -> CostTable:
    """`costs` as steps of `runner` show them (`calibrated_by`). Collective.

    runner: runs the plain lowering, on the link of `costs`.
    """
    steps = [runner.step()[1].events for _ in range(NUM_STEPS)]
    return calibrated_by(cell, costs, steps, in_delay_mode=runner.in_delay_mode)


def calibrated_by(
    cell: Cell, costs: CostTable, steps: Sequence[Sequence[Event]], *, in_delay_mode: bool
) -> CostTable:
    """`costs` with what `steps` of this rank and of all others show: seconds of phases (medians; in delay
    mode they keep their nominal ones), how ranks differ from them, and what starting and ending exchanges
    takes. Collective.
    """
    ranks = cell.gather(list(steps))
    found = calibrate(costs, _events(ranks))
    if in_delay_mode:
        found = replace(found, phases=costs.phases)
    at = cell.topology.rank_of
    # Of the first expert group; with more of them the others are left out.
    groups = [
        [list(chain.from_iterable(ranks[at(p, m)])) for m in range(cell.topology.expert)]
        for p in range(cell.topology.pipeline)
    ]
    return replace(costs, phases=found.phases, overheads=found.overheads, jitter=jitter_of(found, groups))


def _events(ranks: Sequence[Sequence[Sequence[Event]]]) -> list[TraceEvent]:
    """The steps of all ranks. Every step of every rank counts as a rank of its own: its actions do not mix
    with those of another.
    """
    return [
        TraceEvent(number, e.action, e.start, e.end, e.payload_bytes)
        for number, events in enumerate(chain.from_iterable(ranks))
        for e in events
    ]
