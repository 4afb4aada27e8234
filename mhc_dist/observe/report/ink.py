"""Pictures for a page that may be light or dark, and the same pictures as PNG.

Text, axes and grid of an inline SVG take the page's text colour; data keeps its own, chosen to stand out on
both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#123457"
"""Stands for the page's text colour in SVGs; no data is drawn in it."""
PNG_INK = "#222222"

SERIES = ("#3b82d6", "#d97706", "#2f9e6e", "#c2410c", "#9061c2", "#0891b2", "#b45372", "#65850e")
"""Readable on white and on near-black: contrast at least 3 with both."""

Draw = Callable[[Figure], None]


def svg(draw: Draw, width: float, height: float, label: str) -> str:
    """An inline SVG element, `width` x `height` inches at most, that scales with the page."""
    text = io.StringIO()
    with rc_context(_style(INK)):
        figure = _figure(draw, width, height)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    content = text.getvalue()
    content = content[content.index("<svg") :].replace(INK, "currentColor")
    # The size comes from the page; without these two attributes the view box scales with it.
    head, rest = content.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{label}">{rest}'


def png(draw: Draw, width: float, height: float, path: Path) -> None:
    """The same picture on white."""
    with rc_context(_style(PNG_INK)):
        _figure(draw, width, height).savefig(path, dpi=130)


def _figure(draw: Draw, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    return figure


def _style(ink: str) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "mhc",  # the same run gives the same page
        "font.family": "sans-serif",
        "font.sans-serif": ["system-ui", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": ink,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "path.simplify": True,
    }


def plain(axes: Axes, ylabel: str, xlabel: str = "step") -> None:
    """The look that all charts share."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
