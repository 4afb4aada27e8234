"""The ways to run one step, with and without overlap."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source

OTHERS = {
    "overlap_veth": "Between network namespaces",
    "overlap_4": "Two pipeline ranks and two data ranks",
}


def overlap_variants(collection: Collection) -> str:
    """One row a way to run the same step: on two ranks, between network namespaces, on four ranks."""
    parts = [_overlap(collection, "overlap")]
    for name, title in OTHERS.items():
        if collection.get(name) is None:
            parts.append(f"*{title}: {collection.missing(name)}.*")
        else:
            parts += [f"{title}:", _overlap(collection, name)]
    return "\n\n".join(parts)


def _overlap(collection: Collection, name_of_file: str) -> str:
    figures = collection.need(name_of_file).figures
    titles = {
        "no_overlap": "nothing overlaps, nothing recomputed",
        "no_overlap_recompute": "nothing overlaps, recomputation right before its use",
        "overlap": "overlap, nothing recomputed",
        "overlap_late_recompute": "overlap, recomputation right before its use",
        "overlap_placed": "overlap, recomputation placed",
    }
    rows = []
    for name, title in titles.items():
        if name not in figures["step_seconds"]:  # an earlier bench had fewer variants
            continue
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
