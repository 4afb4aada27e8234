"""Pictures of the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

SMALLEST_SHOWN = 1e-9
STYLES = {"fp32, paper": "-", "fp32, deepseek_v4": "--", "bf16, paper": ":", "bf16, deepseek_v4": "-."}
EXACT_STYLES = {"fp32": "-", "bf16": ":"}

NUM_COLOURS = 96
SMOOTHED = 12
"""Points of the loss curve, each of them every third step of 300."""

Curves = Mapping[str, Sequence[dict[str, Any]]]


def plot_stability(curves: Curves, path: Path) -> Path:
    """Losses, gradient norm, gains over steps and over depth; a line a seed, a colour a variant."""
    figure = Figure(figsize=(14, 11), layout="constrained")
    grid = figure.subplots(3, 3)
    colours = {name: f"C{index}" for index, name in enumerate(curves)}
    _validation(grid[0, 0], curves, colours)
    _difference(grid[0, 1], curves, colours)
    panels = (
        (grid[0, 2], "grad_norm", "Gradient norm before clipping", "step"),
        (grid[1, 0], "forward_gain", "Composite Amax gain, forward", "step"),
        (grid[1, 1], "backward_gain", "Composite Amax gain, backward", "step"),
        (grid[1, 2], "depth_forward", "Gain of the first layers at the end, forward", "layers"),
        (grid[2, 0], "single_forward_gain", "Largest gain of one sublayer, forward", "step"),
        (grid[2, 1], "single_backward_gain", "Largest gain of one sublayer, backward", "step"),
        (grid[2, 2], "depth_backward", "Gain of the first layers at the end, backward", "layers"),
    )
    for axis, key, title, unit in panels:
        for name, parts in curves.items():
            for part in parts:
                if key == "grad_norm":
                    along = part["steps"]
                else:
                    along = part["measured_steps"] if unit == "step" else range(1, len(part[key]) + 1)
                axis.plot(along, part[key], color=colours[name], lw=0.9, alpha=0.8)  # of one stream: no gains
        _finish(axis, title, unit, is_log=True)
    lines = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize=10)
    return _save(figure, path, dpi=80)


def _validation(axis: Axes, curves: Curves, colours: Mapping[str, str]) -> None:
    """A dot a seed, a dash for their mean."""
    for place, (name, parts) in enumerate(curves.items()):
        losses = [part["validation_loss"] for part in parts]
        axis.plot([place] * len(losses), losses, "o", color=colours[name], ms=5, alpha=0.7)
        axis.plot(place, sum(losses) / len(losses), "_", color="black", ms=22)
    _finish(axis, "Validation loss after the last step, nats per token", "", is_log=False)
    axis.set_xticks(range(len(curves)), list(curves), rotation=30, ha="right", fontsize=9)


def _difference(axis: Axes, curves: Curves, colours: Mapping[str, str]) -> None:
    """From the plain residual with the same seed: what all see of the same text cancels."""
    baselines = {part["seed"]: part for part in curves.get("residual", ())}
    for name, parts in curves.items():
        for part in parts:
            baseline = baselines.get(part["seed"])
            if baseline is not None and name != "residual":
                gap = [one - other for one, other in zip(part["loss"], baseline["loss"], strict=True)]
                smooth = running_mean(gap, SMOOTHED)
                axis.plot(part["steps"], smooth, color=colours[name], lw=0.9, alpha=0.8)
    axis.axhline(0.0, color="black", lw=0.8)
    _finish(axis, "Training loss minus the plain residual's, smoothed", "step", is_log=False)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last `width` values, or as many as there are."""
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def plot_sinkhorn(figures: Mapping[str, Any], path: Path) -> Path:
    """Residual, gain, difference from fp64 over iterations; a colour a width, a style a precision and eps.

    `figures` is what the study found: `cases` by width, precision and eps, and `exact` mixes, of which
    `mhc_lite` is drawn: its widest logits, as its figures hardly depend on them.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = (
        ("column_residual", "Largest distance of a column sum from 1", 0.0),
        ("gain", "Distance from 1 of the composite Amax gain of 48 mixes", 1.0),
        ("difference", "Largest difference from fp64, eps 0, as many iterations", 0.0),
    )
    widths = list(dict.fromkeys(name.partition(", ")[0] for name in figures["cases"]))
    colours = {width: f"C{index}" for index, width in enumerate(widths)}
    exact = {dtype: figures["exact"][f"mhc_lite, {widths[-1]}, {dtype}"] for dtype in EXACT_STYLES}
    for axis, (key, title, base) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, case in figures["cases"].items():
            width, _, rest = name.partition(", ")
            values = [max(abs(value - base), SMALLEST_SHOWN) for value in case[key]]
            axis.plot(case["iterations"], values, color=colours[width], ls=STYLES[rest], lw=1.4, alpha=0.8)
        for dtype, style in EXACT_STYLES.items():
            value = max(abs(exact[dtype][key] - base), SMALLEST_SHOWN)
            axis.axhline(value, color="black", ls=style, lw=1.0)
        _finish(axis, title, "Sinkhorn iterations", is_log=True)
    lines = [Line2D([], [], color=colour, label=f"logits of {width}") for width, colour in colours.items()]
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


def _finish(axis: Axes, title: str, unit: str, *, is_log: bool) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit)
    if is_log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
