"""The ways to run one step, with and without overlap."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


def overlap_variants(collection: Collection) -> str:
    """One row a way to run the same step, on two ranks and on four."""
    parts = [_overlap(collection, "overlap")]
    if collection.get("overlap_4") is not None:
        parts.append("Two pipeline ranks and two data ranks:")
    return "\n\n".join([*parts, _overlap(collection, "overlap_4")])


def _overlap(collection: Collection, name_of_file: str) -> str:
    if name_of_file != "overlap" and collection.get(name_of_file) is None:
        return f"*Four ranks: {collection.missing(name_of_file)}.*"
    figures = collection.need(name_of_file).figures
    titles = {
        "no_overlap": "nothing overlaps",
        "overlap": "overlap, nothing recomputed",
        "overlap_late_recompute": "overlap, recomputation right before its use",
        "overlap_placed": "overlap, recomputation placed",
    }
    rows = []
    for name, title in titles.items():
        ratio = figures["speedup_over_no_overlap"][name]
        rows.append(
            [
                title,
                shown(figures["step_seconds"][name], "s"),
                shown(ratio["median"], "x") + f" ({ratio['low']:.2f} to {ratio['high']:.2f})",
                shown(figures["all_to_all_hidden"][name], "%"),
                shown(figures["recompute_hidden"][name], "%"),
                shown(figures["simulator"][name]["ratio"], ".2f"),
            ]
        )
    headings = [
        "variant",
        "step",
        "as fast as the first",
        "all-to-all hidden",
        "recompute hidden",
        "simulated / run",
    ]
    return with_source(collection, table(headings, rows), name_of_file)
