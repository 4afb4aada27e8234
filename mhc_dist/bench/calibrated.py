"""Costs of a bench's compute as the ranks themselves show it, on the link that the bench is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhc_dist.bench.cell import Cell, Runner
from mhc_dist.pipeline.calibrate import calibrate, jitter_of
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.perfetto import TraceEvent
from mhc_dist.pipeline.trace import Event

NUM_STEPS = 2


def calibrated(cell: Cell, costs: CostTable, runner: Runner) -> CostTable:
    """`costs` with what steps of `runner` show: seconds of phases (medians; in delay mode they keep their
    nominal ones), how far phases differ from them, and what starting and ending exchanges takes. Collective.

    runner: runs the plain lowering, on the link of `costs`.
    """
    events = traced_events(cell, [runner.step()[1].events for _ in range(NUM_STEPS)])
    found = calibrate(costs, events)
    return replace(
        costs,
        phases=costs.phases if runner.in_delay_mode else found.phases,
        overheads=found.overheads,
        jitter=jitter_of(costs if runner.in_delay_mode else found, events, cell.config.parallel.expert),
    )


def traced_events(cell: Cell, steps: Sequence[Sequence[Event]]) -> list[TraceEvent]:
    """Own steps and those of all ranks. Collective.

    Every step of every rank counts as a rank of its own: its actions do not mix with those of another.
    """
    timelines = [events for of_rank in cell.gather(list(steps)) for events in of_rank]
    return [
        TraceEvent(number, e.action, e.start, e.end, e.payload_bytes)
        for number, events in enumerate(timelines)
        for e in events
    ]
