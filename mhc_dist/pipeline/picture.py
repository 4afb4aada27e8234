"""A program's run as a PNG: one row per rank, a thin lane below it for each kind of communication."""

from __future__ import annotations

from pathlib import Path

from mhc_dist.pipeline.bars import COLOURS, MEANINGS, bars, lanes
from mhc_dist.pipeline.demonstration import Shown

COMPUTE_HEIGHT = 0.6
LANE_HEIGHT = 0.15
INCHES_PER_FORWARD = 0.6
LABEL_INCHES = 0.065
"""Width of a digit of a microbatch's number; narrower bars go without."""


def draw_png(shown: Shown, path: Path) -> None:
    """Write the picture. Matplotlib is imported here: nothing else of the pipeline needs it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    all_bars = bars(shown.simulation)
    names = lanes(all_bars)
    num_ranks, makespan = shown.program.num_ranks, shown.simulation.makespan
    in_forwards = shown.unit == "forward"
    width = min(40.0, max(11.0, makespan * INCHES_PER_FORWARD)) if in_forwards else 24.0
    figure = Figure(figsize=(width, 1.6 + 0.9 * num_ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inches = (width - 1.0) / (makespan or 1.0)
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
                linewidth=0.2 if lane == "compute" else 0.0,
            )
            for bar in own:
                if bar.label and (bar.end - bar.start) * inches > LABEL_INCHES * len(bar.label):
                    axes.text(
                        (bar.start + bar.end) / 2,
                        top + height / 2,
                        bar.label,
                        ha="center",
                        va="center",
                        fontsize=6,
                    )
    centres = [COMPUTE_HEIGHT / 2, *(COMPUTE_HEIGHT + (i + 0.4) * LANE_HEIGHT for i in range(len(names) - 1))]
    axes.set_yticks([rank + centre for rank in range(num_ranks) for centre in centres])
    axes.set_yticklabels([text for rank in range(num_ranks) for text in (f"rank {rank}", *names[1:])])
    for position, tick in enumerate(axes.get_yticklabels()):
        tick.set_fontsize(10 if position % len(names) == 0 else 6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(num_ranks, -0.1)
    axes.set_xlim(0, makespan)
    axes.set_xlabel(f"time in units of one {shown.unit}" if in_forwards else "seconds")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    program = shown.program
    axes.set_title(
        f"{program.schedule}, {num_ranks} ranks, {program.num_microbatches} microbatches (numbers);"
        " lighter: not the rank's first chunk",
        loc="left",
    )
    used = {bar.action.kind for bar in all_bars}
    patches = [Patch(color=COLOURS[kind], label=text) for kind, text in MEANINGS.items() if kind in used]
    figure.legend(
        handles=patches, ncols=4 if width < 16 else len(patches), loc="outside lower center", frameon=False
    )
    figure.savefig(path, dpi=110)
