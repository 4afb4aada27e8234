"""What the studies say of stability and of Sinkhorn's iterations."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


def stability(collection: Collection) -> str:
    """One row a residual kind."""
    variants = collection.need("stability").figures["variants"]
    rows = []
    for name, of in variants.items():
        deviation = of["validation_loss_deviation"]
        rows.append(
            [
                name,
                str(of["seeds"]),
                f"{of['validation_loss']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}"),
                shown(of["largest_forward_gain"], ".3g"),
                shown(of["largest_backward_gain"], ".3g"),
                shown(of["largest_single_forward_gain"], ".3g"),
                shown(of["largest_grad_norm"], ".3g"),
            ]
        )
    headings = [
        "kind",
        "seeds",
        "validation loss",
        "largest gain, forward",
        "backward",
        "of one layer",
        "largest gradient norm",
    ]
    return with_source(collection, table(headings, rows), "stability")


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
