"""The charts of a report. Each draws what a run recorded, or says that there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mhc_dist.observe.loss_plot import smooth
from mhc_dist.observe.report.ink import SERIES, Draw, plain
from mhc_dist.observe.report.run_record import RunRecord
from mhc_dist.observe.report.thin import thin
from mhc_dist.observe.stability_log import composite_gains
from mhc_dist.pipeline.trace import StepPhase

WIDTH, HEIGHT = 5.8, 3.2

PHASE_COLOURS = {
    StepPhase.FORWARD: "#3b82d6",
    StepPhase.BACKWARD: "#2f9e6e",
    StepPhase.WEIGHT_GRADIENT: "#8cc084",
    StepPhase.RECOMPUTE: "#9061c2",
    StepPhase.OPTIMIZER: "#5b7fb8",
    StepPhase.DATA: "#9db8d9",
    StepPhase.CHECKPOINT: "#7a8fa8",
    StepPhase.OTHER: "#8a8a8a",
    StepPhase.EXPOSED_ALL_TO_ALL: "#d64545",
    StepPhase.EXPOSED_P2P: "#e07b1a",
    StepPhase.BUBBLE: "#d3a518",
}
"""Computation cool, waiting warm; drawn in this order from the left."""

PHASE_NAMES = {
    StepPhase.WEIGHT_GRADIENT: "weight gradients",
    StepPhase.EXPOSED_ALL_TO_ALL: "exposed all-to-all",
    StepPhase.EXPOSED_P2P: "exposed p2p",
}


@dataclass(frozen=True)
class Chart:
    """A picture with its words. `slug` names its PNG."""

    slug: str
    title: str
    text: str
    draw: Draw
    height: float = HEIGHT


def loss_chart(runs: Sequence[RunRecord]) -> Chart | None:
    """Training and validation loss; one run also shows its bigram baseline."""
    if not any(run.series("loss")[0] for run in runs):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            colour = SERIES[index % len(SERIES)]
            steps, losses = run.series("loss")
            name = "training" if len(runs) == 1 else run.name
            reach = len(losses) // 50
            if reach:
                axes.plot(*thin(steps, losses), color=colour, lw=0.6, alpha=0.3)
                axes.plot(
                    *thin(steps, list(smooth(np.array(losses), reach))), color=colour, lw=1.6, label=name
                )
            else:
                axes.plot(steps, losses, color=colour, lw=1.6, label=name)
            at, validation = run.series("validation_loss")
            if at:
                dots = SERIES[1] if len(runs) == 1 else colour
                label = f"validation, last {validation[-1]:.3f}" if len(runs) == 1 else None
                axes.plot(
                    at,
                    validation,
                    "o",
                    ls="--" if len(runs) > 1 else "-",
                    lw=1.2,
                    ms=4,
                    color=dots,
                    label=label,
                )
        baseline = (runs[0].summary or {}).get("bigram_loss")
        if len(runs) == 1 and isinstance(baseline, float):
            axes.axhline(baseline, color=SERIES[2], ls="--", lw=1.2, label=f"bigram, {baseline:.3f}")
        plain(axes, "nats per token")
        axes.legend()

    text = "Every step in the pale line, a running mean in the strong one; dots are validations."
    return Chart("loss", "Loss", text, draw)


def line_chart(
    runs: Sequence[RunRecord], key: str, title: str, unit: str, text: str, *, log: bool = False
) -> Chart | None:
    """One number of the run's log over its steps."""
    if not any(run.series(key)[0] for run in runs):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            axes.plot(*thin(*run.series(key)), lw=1.1, color=SERIES[index % len(SERIES)], label=run.name)
        if log:
            axes.set_yscale("log")
        plain(axes, unit)
        if len(runs) > 1:
            axes.legend()

    return Chart(key.replace("_", "-"), title, text, draw, height=2.8)


def phase_chart(run: RunRecord) -> Chart | None:
    """Where the wall time of each rank went."""
    if not run.ranks:
        return None
    seconds = {
        rank.rank: {
            phase: sum(line["phase_seconds"].get(phase.value, 0.0) for line in rank.lines)
            for phase in PHASE_COLOURS
        }
        for rank in run.ranks
    }
    used = [phase for phase in PHASE_COLOURS if any(times[phase] > 0 for times in seconds.values())]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        left = np.zeros(len(seconds))
        totals = np.array([sum(times.values()) for times in seconds.values()])
        names = [f"rank {rank.rank}, stage {rank.stage}" for rank in run.ranks]
        for phase in used:
            share = np.array([times[phase] for times in seconds.values()]) / totals
            axes.barh(
                names, share, left=left, color=PHASE_COLOURS[phase], label=PHASE_NAMES.get(phase, phase.value)
            )
            left += share
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)

    text = (
        "Share of each rank's wall time, all steps together. Phases exclude each other: computation is cool,"
        " waiting is warm."
    )
    return Chart("phases", "Where the time went", text, draw, height=1.6 + 0.32 * len(seconds))


def memory_chart(run: RunRecord) -> Chart | None:
    """Memory of each rank after its steps."""
    lines = {
        rank.rank: [
            (line["step"], line["memory_allocated_bytes"])
            for line in rank.lines
            if line["memory_allocated_bytes"] is not None
        ]
        for rank in run.ranks
    }
    if not any(lines.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, (rank, points) in enumerate(lines.items()):
            steps, values = zip(*points, strict=True)
            colour = SERIES[index % len(SERIES)]
            axes.plot(*thin(steps, np.array(values) / 2**20), lw=1.3, color=colour, label=f"rank {rank}")
        axes.set_ylim(bottom=0)
        plain(axes, "MiB")
        if len(lines) <= len(SERIES):
            axes.legend(ncols=4)

    return Chart("memory", "Memory", "Of each rank's process (or device) after its steps.", draw, height=2.8)


def gain_chart(run: RunRecord) -> Chart | None:
    """Composite Amax gain of the whole model, from what each stage wrote down."""
    points = composite_gains(run.stability)
    if not points["forward"]:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, (direction, series) in enumerate(points.items()):
            steps, gains = zip(*sorted(series.items()), strict=True)
            axes.plot(*thin(steps, gains), lw=1.5, color=SERIES[index], label=direction)
        axes.axhline(1.0, color=SERIES[2], ls="--", lw=1.0, label="doubly stochastic")
        axes.set_yscale("log")
        plain(axes, "gain")
        axes.legend()

    text = (
        "Of the product of all residual mixes (paper, section 5.4): largest row sum for signals going"
        " forward, largest column sum for gradients going back. mHC stays near 1."
    )
    return Chart("amax-gain", "Amax gain of the whole model", text, draw, height=2.8)


def layer_chart(run: RunRecord) -> Chart | None:
    """Every sublayer's gain and Sinkhorn residual, as last measured."""
    measured = [line for line in run.stability if line.get("kind") == "layers"]
    if not measured:
        return None
    step = max(line["step"] for line in measured)
    sublayers = sorted(
        (one for line in measured if line["step"] == step for one in line["sublayers"]),
        key=lambda one: one["sublayer"],
    )

    def draw(figure: Figure) -> None:
        gains, residuals = figure.subplots(2, 1, sharex=True)
        numbers = [one["sublayer"] for one in sublayers]
        for index, direction in enumerate(("forward", "backward")):
            values = [one[f"{direction}_gain"] for one in sublayers]
            gains.plot(numbers, values, "o-", ms=3, lw=1.0, color=SERIES[index], label=direction)
        for index, axis in enumerate(("row", "column")):
            values = [max(one[f"{axis}_residual"], 1e-12) for one in sublayers]
            residuals.plot(numbers, values, "o-", ms=3, lw=1.0, color=SERIES[index + 2], label=f"{axis}s")
        residuals.set_yscale("log")
        plain(gains, "gain", "")
        plain(residuals, "distance from 1", "sublayer")
        gains.legend(ncols=2)
        residuals.legend(ncols=2)

    text = f"After step {step}: each sublayer's own Amax gain, and how far its sums are from 1."
    return Chart("sublayers", "Residual mixes, layer by layer", text, draw, height=3.6)
