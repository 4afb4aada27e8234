"""What the studies say of stability and of Sinkhorn's iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


def stability(collection: Collection) -> str:
    """One row a residual kind; and when the models were trained, if that was not when the table was made."""
    file = collection.need("stability")
    rows = []
    for name, of in file.figures["variants"].items():
        deviation = of["validation_loss_deviation"]
        rows.append(
            [
                name,
                str(of["seeds"]),
                f"{of['validation_loss']:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}"),
                *(_median_and_range(of[f"last_{way}_gain"]) for way in ("forward", "backward")),
                shown(_largest(of, "forward_gain", "backward_gain"), ".5g"),
                shown(_largest(of, "single_forward_gain", "single_backward_gain"), ".5g"),
                f"{of['median_grad_norm']:.2f}, {of['largest_grad_norm']:.1f}",
            ]
        )
    headings = [
        "kind",
        "seeds",
        "validation loss, ± deviation of seeds",
        "composite gain at the end, forward: median (range) of seeds",
        "backward",
        "largest of all steps",
        "largest of one sublayer",
        "gradient norm: median, largest",
    ]
    text = table(headings, rows)
    commits = file.figures["commits"]
    if commits != [file.commit]:
        text += f"\n\nThe models were trained at commit {', '.join(commits)}."
    return with_source(collection, text, "stability")


def _median_and_range(gains: Sequence[float]) -> str:
    if not gains:
        return "none"
    middle = shown(median(gains), ".5g")
    return (
        middle if len(gains) == 1 else f"{middle} ({shown(min(gains), '.5g')} to {shown(max(gains), '.5g')})"
    )


def _largest(variant: Mapping[str, Any], *keys: str) -> float | None:
    gains = [gain for key in keys if (gain := variant[f"largest_{key}"]) is not None]
    return max(gains, default=None)


def sinkhorn(collection: Collection) -> str:
    """After 20 iterations, the paper's number, every case; and the exact mixes."""
    figures = collection.need("sinkhorn").figures
    rows = []
    for name, case in figures["cases"].items():
        at = case["iterations"].index(20)
        rows.append(
            [
                name,
                *(f"{case[key][at]:.2g}" for key in ("column_residual", "row_residual")),
                f"{case['gain'][at]:.6f}",
            ]
        )
    rows += [
        [
            f"exact: {name}",
            *(f"{of[key]:.2g}" for key in ("column_residual", "row_residual")),
            f"{of['gain']:.6f}",
        ]
        for name, of in figures["exact"].items()
    ]
    headings = ["20 iterations", "columns from 1, at most", "rows from 1, at most", "composite gain"]
    return with_source(collection, table(headings, rows), "sinkhorn")
