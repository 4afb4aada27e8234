"""One step as it ran, and as it was planned: a row per rank, drawn to one scale."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mhc_dist.config import RunConfig
from mhc_dist.observe.report.charts import Chart
from mhc_dist.observe.report.run_record import RunRecord
from mhc_dist.pipeline.action import ActionKind
from mhc_dist.pipeline.bars import COLOURS
from mhc_dist.pipeline.perfetto import ACTIONS, TraceEvent, read_events

KINDS = {
    ActionKind.COMPUTE: "forward",
    ActionKind.GRADIENT: "backward",
    ActionKind.WEIGHT: "weight gradient",
    ActionKind.RECOMPUTE: "recompute",
    ActionKind.WAIT: "waiting for rows",
    ActionKind.ARRIVE: "waiting for a neighbour",
    ActionKind.REDUCE: "reduce and step",
}
WAIT_COLOURS = {ActionKind.WAIT: "#d64545", ActionKind.ARRIVE: "#d3a518"}
SAME = {ActionKind.STEP: ActionKind.REDUCE}
MOST_RANKS = 16


def timeline_chart(run: RunRecord) -> Chart | None:
    """The last traced step; above it the plan, where the run's phases were placed by predicted costs."""
    if not run.traces:
        return None
    step, path = list(run.traces.items())[-1]
    measured = [event for event in read_events(path) if event.lane == ACTIONS and event.column == 0]
    if not measured:
        return None
    ranks = sorted({event.rank for event in measured})[:MOST_RANKS]
    try:
        planned, no_plan = planned_events(run), ""
    except ValueError as error:
        # Another version wrote the run, or its cluster file is gone: the measured step is still there.
        planned, no_plan = [], f" Its plan cannot be made anew: {str(error).splitlines()[0]}"
    length = max(event.end for event in measured) - min(event.start for event in measured)

    def draw(figure: Figure) -> None:
        rows = 2 if planned else 1
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        if planned:
            _draw(axes[0], planned, "planned")
        _draw(axes[-1], [event for event in measured if event.rank in ranks], f"measured, step {step}")
        axes[-1].set_xlabel("seconds")
        patches = [Patch(color=_colour(kind), label=name) for kind, name in KINDS.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=9)

    text = (
        f"Step {step}, which took {length:.2f} s, on the ranks of the first data column."
        f" Every action is in {path.relative_to(run.folder)}, to be opened at ui.perfetto.dev."
    )
    text += no_plan
    if planned:
        text += " The plan uses predicted costs: compare the shapes, not the seconds."
    height = 1.4 + 0.42 * len(ranks) * (2 if planned else 1) + (0.6 if planned else 0.0)
    return Chart("timeline", "One step, rank by rank", text, draw, height)


def planned_events(run: RunRecord) -> list[TraceEvent]:
    """The run's own program, simulated with the costs it was placed by; empty if it was not placed.

    Raises ValueError when configuration or cluster file cannot be read (any more).
    """
    config = RunConfig.model_validate(run.config)
    if config.schedule.cluster is None:
        return []
    # Imported here: a report of an older run needs none of it.
    from mhc_dist.pipeline.simulate import Simulation
    from mhc_dist.plan.cluster import load_cluster
    from mhc_dist.plan.machine import Machine
    from mhc_dist.plan.run_costs import placed_program, run_costs

    machine = Machine(load_cluster(config.schedule.cluster))
    simulation = Simulation(placed_program(config, machine), run_costs(config, machine))
    return [
        TraceEvent(rank, done.action, done.start, done.end)
        for rank, timeline in enumerate(simulation.ranks)
        for done in timeline.actions
    ]


def _draw(axes: Axes, events: Sequence[TraceEvent], title: str) -> None:
    ranks = sorted({event.rank for event in events})
    start = min(event.start for event in events)
    for kind in KINDS:
        chosen = [e for e in events if SAME.get(e.action.kind, e.action.kind) is kind and e.end > e.start]
        for row, rank in enumerate(ranks):
            bars = [(e.start - start, e.end - e.start) for e in chosen if e.rank == rank]
            if bars:
                axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_colour(kind), linewidth=0)
    # A planned run has pipeline ranks, a real one world ranks: stages are what both have.
    names = [f"stage {row}" if row == rank else f"stage {row}, rank {rank}" for row, rank in enumerate(ranks)]
    axes.set_yticks(range(len(ranks)), names)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xlim(0, max(event.end for event in events) - start)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _colour(kind: ActionKind) -> str:
    return WAIT_COLOURS.get(kind) or COLOURS[kind]
