"""Pictures of the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

COLOURS = {
    "residual": "#000000",
    "hc": "#d55e00",
    "mhc": "#0072b2",
    "mhc_zero_bias": "#56b4e9",
    "identity": "#009e73",
    "mhc_lite": "#e69f00",
    "krom": "#cc79a7",
    "mhc_shifted": "#7a7a7a",
}
"""By variant: Okabe and Ito's, which colour-blind readers tell apart."""

GROWS = "hc"
"""The one kind whose gains nothing bounds."""

SMALLEST_SHOWN = 1e-9
STYLES = {"fp32, paper": "-", "fp32, deepseek_v4": "--", "bf16, paper": ":", "bf16, deepseek_v4": "-."}
EXACT_STYLES = {"fp32": "-", "bf16": ":"}

NUM_COLOURS = 96
SMOOTHED = 12
"""Points of the loss curve, each of them every third step of 300."""

SPIKES = 5
"""Points of the gradient norm that one dot stands for: its largest."""

Curves = Mapping[str, Sequence[dict[str, Any]]]


def plot_stability(curves: Curves, path: Path) -> Path:
    """Losses, gradient norm, composite gains over steps and over depth; a colour a variant."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    grid = figure.subplots(2, 3)
    _validation(grid[0, 0], curves)
    _difference(grid[0, 1], curves)
    _gradients(grid[0, 2], curves)
    _composite(grid[1, 0], curves, "gain", "Composite Amax gain", "step")
    _composite(grid[1, 1], curves, "depth", "Composite gain of the first layers, at the end", "layers")
    _bounded(grid[1, 2], curves)
    lines = [Line2D([], [], color=COLOURS[name], lw=2, label=name) for name in curves]
    lines += [
        Line2D([], [], color="#444444", ls=style, label=label)
        for style, label in (("-", "forward"), ("--", "backward"))
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=9)
    return _save(figure, path, dpi=90)


def _validation(axis: Axes, curves: Curves) -> None:
    """A dot a seed, a dash for their mean."""
    for place, (name, parts) in enumerate(curves.items()):
        losses = [part["validation_loss"] for part in parts]
        axis.plot([place] * len(losses), losses, "o", color=COLOURS[name], ms=5, alpha=0.7)
        axis.plot(place, sum(losses) / len(losses), "_", color="black", ms=22)
    _finish(axis, "Validation loss at the end: a dot a seed", "", "nats per token")
    axis.set_xticks(range(len(curves)), list(curves), rotation=30, ha="right", fontsize=8)


def _difference(axis: Axes, curves: Curves) -> None:
    """From the plain residual with the same seed: what all see of the same text cancels."""
    baselines = {part["seed"]: part for part in curves.get("residual", ())}
    for name, parts in curves.items():
        for part in parts:
            baseline = baselines.get(part["seed"])
            if baseline is not None and name != "residual":
                gap = [one - other for one, other in zip(part["loss"], baseline["loss"], strict=True)]
                smooth = running_mean(gap, SMOOTHED)
                axis.plot(part["steps"], smooth, color=COLOURS[name], lw=1.0, alpha=0.8)
    axis.axhline(0.0, color="black", lw=0.8)
    _finish(axis, "Training loss minus the plain residual's, smoothed", "step", "nats per token")


def _gradients(axis: Axes, curves: Curves) -> None:
    """Spikes last a step, another one with every seed: the largest of a window, the seeds' median."""
    steps = next(iter(curves.values()))[0]["steps"]
    width = SPIKES * (steps[1] - steps[0] if len(steps) > 1 else 1)
    for name, parts in curves.items():
        along = [window[-1] for window in windows(steps, SPIKES)]
        largest = zip(*(map(max, windows(part["grad_norm"], SPIKES)) for part in parts), strict=True)
        axis.plot(along, [median(norms) for norms in largest], color=COLOURS[name], lw=1.2, alpha=0.85)
    title = f"Gradient norm: largest of {width} steps, median of seeds"
    _finish(axis, title, "step", "", is_log=True)


def _composite(axis: Axes, curves: Curves, which: str, title: str, unit: str) -> None:
    """`hc` by seed and direction; what is bounded lies on one line, and words tell how near to 1."""
    farthest = 1.0
    for name, parts in curves.items():
        for part in parts:
            for direction, style in (("forward", "-"), ("backward", "--")):
                key = f"{direction}_gain" if which == "gain" else f"depth_{direction}"
                gains = part[key]
                along = part["measured_steps"] if which == "gain" else range(1, len(gains) + 1)
                if name == GROWS:
                    axis.plot(along, gains, color=COLOURS[name], lw=1.1, ls=style, alpha=0.85)
                elif gains:
                    farthest = max(farthest, max(gains))
                    axis.plot(along, gains, color=COLOURS["mhc"], lw=1.6)
    axis.annotate(
        f"mhc and all others: at most {farthest:.3f}",
        xy=(0.97, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    _finish(axis, title, unit, "times", is_log=True)


def _bounded(axis: Axes, curves: Curves) -> None:
    """How far from 1 the bounded kinds are: the distance of the median seed, the farther direction."""
    for name, parts in curves.items():
        measured = [part for part in parts if part["measured_steps"] and part["forward_gain"]]
        if name in (GROWS, "identity") or not measured:  # of `identity` the mixes are 1 exactly
            continue
        for direction, style in (("forward", "-"), ("backward", "--")):
            gains = zip(*(part[f"{direction}_gain"] for part in measured), strict=True)
            away = [max(median(abs(gain - 1) for gain in of), SMALLEST_SHOWN) for of in gains]
            axis.plot(measured[0]["measured_steps"], away, color=COLOURS[name], lw=1.3, ls=style, alpha=0.9)
    _finish(axis, "Distance of the composite gain from 1: median of seeds", "step", "", is_log=True)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last `width` values, or as many as there are."""
    ends = range(1, len(values) + 1)
    return [sum(window) / len(window) for window in (values[max(0, end - width) : end] for end in ends)]


def windows(values: Sequence[float], width: int) -> list[Sequence[float]]:
    """One after the other, the last one perhaps shorter."""
    return [values[first : first + width] for first in range(0, len(values), width)]


def plot_sinkhorn(figures: Mapping[str, Any], path: Path) -> Path:
    """Residual, gain, difference from fp64 over iterations; a colour a width, a style a precision and eps.

    `figures` is what the study found: `cases` by width, precision and eps, and `exact` mixes, of which
    `mhc_lite` is drawn: its widest logits, as its figures hardly depend on them.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = (
        ("column_residual", "Column sums: largest distance from 1", 0.0),
        ("gain", "Composite Amax gain of 48 mixes: distance from 1", 1.0),
        ("difference", "Mixes: largest difference from fp64 with eps 0", 0.0),
    )
    widths = list(dict.fromkeys(name.partition(", ")[0] for name in figures["cases"]))
    colours = dict(zip(widths, (COLOURS["mhc"], COLOURS["mhc_lite"], COLOURS["identity"]), strict=True))
    exact = {dtype: figures["exact"][f"mhc_lite, {widths[-1]}, {dtype}"] for dtype in EXACT_STYLES}
    for axis, (key, title, base) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, case in figures["cases"].items():
            width, _, rest = name.partition(", ")
            values = [max(abs(value - base), SMALLEST_SHOWN) for value in case[key]]
            axis.plot(case["iterations"], values, color=colours[width], ls=STYLES[rest], lw=1.4, alpha=0.8)
        for dtype, style in EXACT_STYLES.items():
            value = max(abs(exact[dtype][key] - base), SMALLEST_SHOWN)
            axis.axhline(value, color="black", ls=style, lw=1.0)
        _finish(axis, title, "Sinkhorn iterations", "", is_log=True)
    lines = [
        Line2D([], [], color=colour, label=f"logits, deviation {width.removeprefix('width ')}")
        for width, colour in colours.items()
    ]
    lines += [Line2D([], [], color="grey", ls=style, label=rest) for rest, style in STYLES.items()]
    lines += [
        Line2D([], [], color="black", ls=style, lw=1.0, label=f"mhc_lite, no iterations, {dtype}")
        for dtype, style in EXACT_STYLES.items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, fontsize=9)
    return _save(figure, path, dpi=100)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    """As a PNG of few colours, a third of the bytes: pictures of results are kept in the repository."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def _finish(axis: Axes, title: str, unit: str, values: str, *, is_log: bool = False) -> None:
    axis.set_title(title, fontsize=9.5)
    axis.set_xlabel(unit, fontsize=9)
    axis.set_ylabel(values, fontsize=9)
    axis.tick_params(labelsize=8)
    if is_log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
