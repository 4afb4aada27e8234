"""What the studies say of stability and of Sinkhorn's iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from mhc_dist.results.collection import LINE, Collection
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
    text = f"{table(headings, rows)}\n\n{_sinkhorn_in_words(figures)}"
    return with_source(collection, text, "sinkhorn")


def _sinkhorn_in_words(figures: Mapping[str, Any]) -> str:
    """What iterations buy, and what two choices do to the widest logits; computed, so that it stays true."""
    cases = figures["cases"]
    widths = sorted({int(name.split(",")[0].removeprefix("width ")) for name in cases})
    narrow, wide = (cases[f"width {width}, fp32, paper"] for width in (widths[0], widths[-1]))
    at = wide["iterations"].index(20)
    eps, bf16 = (
        cases[f"width {widths[-1]}, {rest}"]["difference"][at]
        for rest in ("fp32, deepseek_v4", "bf16, paper")
    )
    sums = [shown(case["column_residual"][end], ".2g") for case in (narrow, wide) for end in (0, -1)]
    exact = max(of["column_residual"] for of in figures["exact"].values())
    words = (
        f"From {wide['iterations'][0]} to {wide['iterations'][-1]} iterations the worst column sum gets",
        f"from {sums[0]} to {sums[1]} near 1 for logits of width {widths[0]}, but from {sums[2]} to",
        f"{sums[3]} only for width {widths[-1]}. The gain of {figures['num_sublayers']} mixes is",
        f"{wide['gain'][-1]:.4f} there: what single columns miss averages out over independent mixes.",
        f"At that width and 20 iterations the eps of 1e-6 changes an entry of a mix by up to {eps:.2g}, so",
        f"the two conventions are two functions; rounding logits to bf16, by up to {bf16:.2g}. Exact",
        f"mixes have sums within {exact:.1g} of 1 at any width, without iterations.",
    )
    return fill(" ".join(words), LINE)
