"""`loss.png`: the loss of a run over its steps, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mhc_dist.observe.run_log import Record, read_log

PLOT_FILE = "loss.png"
TRAIN_COLOUR = "#2a6fbb"
VALIDATION_COLOUR = "#c8501e"
BIGRAM_COLOUR = "#5b5b5b"

Series = npt.NDArray[np.float64]


def plot_loss(
    folder: Path, title: str, bigram_loss: float | None = None, unit: str = "nats per token"
) -> Path:
    """Draw `folder`/loss.png from `folder`/metrics.jsonl and return its path.

    Records may hold `loss`, `validation_loss`, both or neither, beside their `step`. The picture appears
    complete or not at all. Raises ValueError when no record holds a loss.
    """
    records = read_log(folder)
    steps, losses = _series(records, "loss")
    validation_steps, validation_losses = _series(records, "validation_loss")
    if len(losses) == 0 and len(validation_losses) == 0:
        raise ValueError(
            f"none of the {len(records)} records of {folder} has a finite loss: nothing to draw."
        )
    # Figure and canvas without pyplot: no global state, no display, nothing to close.
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(losses):
        _draw_training(axes, steps, losses)
    if len(validation_losses):
        label = f"validation, last {validation_losses[-1]:.3f}"
        axes.plot(
            validation_steps, validation_losses, "o-", color=VALIDATION_COLOUR, ms=5, lw=1.4, label=label
        )
    if bigram_loss is not None:
        axes.axhline(bigram_loss, color=BIGRAM_COLOUR, ls="--", lw=1.2, label=f"bigram, {bigram_loss:.3f}")
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / PLOT_FILE
    unfinished = folder / f"unfinished-{PLOT_FILE}"
    figure.savefig(unfinished, dpi=130)
    unfinished.replace(path)
    return path


def smooth(values: Series, reach: int) -> Series:
    """Mean over each value and up to `reach` on either side, over fewer but as many on both near the ends.

    Symmetric, because a mean over the past would hang above a falling curve.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, places[::-1]))
    starts, ends = places - reaches, places + reaches + 1
    result: Series = (total[ends] - total[starts]) / (ends - starts)
    return result


def _draw_training(axes: Axes, steps: Series, losses: Series) -> None:
    reach = len(losses) // 50
    if reach == 0:
        axes.plot(steps, losses, color=TRAIN_COLOUR, lw=1.6, label=f"training, last {losses[-1]:.3f}")
        return
    smoothed = smooth(losses, reach)
    axes.plot(steps, losses, color=TRAIN_COLOUR, lw=0.8, alpha=0.3, label="training, every step")
    label = f"training, mean of {2 * reach + 1} steps, last {np.mean(losses[-2 * reach - 1 :]):.3f}"
    axes.plot(steps, smoothed, color=TRAIN_COLOUR, lw=1.8, label=label)


def _series(records: Sequence[Record], key: str) -> tuple[Series, Series]:
    points = [
        (record["step"], record[key])
        for record in records
        if isinstance(record.get("step"), int) and isinstance(record.get(key), (int, float))
    ]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
