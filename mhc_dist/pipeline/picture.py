"""A program's run as a PNG: one row per rank, a thin lane below it for each kind of communication."""

from __future__ import annotations

from pathlib import Path

from mhc_dist.pipeline.bars import COLOURS, MEANINGS, bars, lanes
from mhc_dist.pipeline.demonstration import Shown

COMPUTE_HEIGHT = 0.6
LANE_HEIGHT = 0.15


def draw_png(shown: Shown, path: Path) -> None:
    """Write the picture. Matplotlib is imported here: nothing else of the pipeline needs it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    all_bars = bars(shown.simulation)
    names = lanes(all_bars)
    num_ranks = shown.program.num_ranks
    width = min(40.0, max(10.0, shown.simulation.makespan * 0.5 if shown.unit == "forward" else 18.0))
    figure = Figure(figsize=(width, 1.2 + 0.9 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for lane_index, lane in enumerate(names):
        for rank in range(num_ranks):
            own = [bar for bar in all_bars if bar.rank == rank and bar.lane == lane]
            top = rank + (0.0 if lane == "compute" else COMPUTE_HEIGHT + (lane_index - 1) * LANE_HEIGHT)
            height = COMPUTE_HEIGHT if lane == "compute" else LANE_HEIGHT * 0.8
            axes.broken_barh(
                [(bar.start, bar.end - bar.start) for bar in own],
                (top, height),
                facecolors=[bar.colour for bar in own],
                edgecolors="white",
                linewidth=0.3,
            )
    axes.set_yticks([rank + COMPUTE_HEIGHT / 2 for rank in range(num_ranks)])
    axes.set_yticklabels([f"rank {rank}" for rank in range(num_ranks)])
    axes.set_ylim(num_ranks, -0.1)
    axes.set_xlim(0, shown.simulation.makespan)
    axes.set_xlabel(f"time in units of one {shown.unit}" if shown.unit == "forward" else "seconds")
    program = shown.program
    axes.set_title(
        f"{program.schedule}, {num_ranks} ranks, {program.num_microbatches} microbatches", loc="left"
    )
    used = {bar.action.kind for bar in all_bars}
    patches = [Patch(color=COLOURS[kind], label=text) for kind, text in MEANINGS.items() if kind in used]
    axes.legend(
        handles=patches, ncols=len(patches), loc="upper right", bbox_to_anchor=(1, 1.12), frameon=False
    )
    figure.savefig(path, dpi=110)
