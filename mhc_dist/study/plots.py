"""Pictures of the studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SMALLEST_SHOWN = 1e-9
STYLES = {"fp32, paper": "-", "fp32, deepseek_v4": "--", "bf16, paper": ":", "bf16, deepseek_v4": "-."}
EXACT_STYLES = {"fp32": "-", "bf16": ":"}

Curves = Mapping[str, Sequence[dict[str, Any]]]


def plot_stability(curves: Curves, path: Path) -> Path:
    """Loss, gradient norm, composite gain over steps and over depth; a line a seed, a colour a variant."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    panels = (
        ("loss", "Training loss, nats per token", False),
        ("grad_norm", "Gradient norm", True),
        ("forward_gain", "Composite Amax gain, forward", True),
        ("backward_gain", "Composite Amax gain, backward", True),
    )
    for axis, (key, title, is_log) in zip(axes, panels, strict=False):
        for colour, (name, parts) in enumerate(curves.items()):
            for index, part in enumerate(parts):
                if part[key]:
                    steps, values = zip(*part[key], strict=True)
                    _line(axis, steps, values, name, colour, index)
        _finish(axis, title, "step", is_log=is_log)
    for axis, direction in zip(axes[4:], ("forward", "backward"), strict=True):
        for colour, (name, parts) in enumerate(curves.items()):
            for index, part in enumerate(parts):
                gains = part[f"depth_{direction}"]
                if gains:
                    _line(axis, range(1, len(gains) + 1), gains, name, colour, index)
        _finish(axis, f"Gain of the first layers at the end, {direction}", "layers", is_log=True)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


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
    figure.savefig(path, dpi=100)
    return path


def _line(
    axis: Axes, x: Sequence[float] | range, y: Sequence[float], name: str, colour: int, index: int
) -> None:
    axis.plot(x, y, color=f"C{colour}", lw=1.2, alpha=0.8, label=name if index == 0 else None)


def _finish(axis: Axes, title: str, unit: str, *, is_log: bool) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit)
    if is_log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
