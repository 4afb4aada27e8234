"""Other engines beside ours."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import table
from mhc_dist.results.sourced import with_source


def peers(collection: Collection) -> str:
    """One row an engine, for every way to compare that was measured."""
    parts = []
    for name in ("peers", "peers_nominal", "peers_veth"):
        file = collection.get(name)
        if file is None:
            parts.append(f"*{name}: {collection.missing(name)}.*")
            continue
        ours = file.figures["speedups"]
        rows = [
            [engine, *(_interval(ours[variant][engine]) for variant in ours)]
            for engine in next(iter(ours.values()))
        ]
        headings = ["their step over ours", *(variant.replace("_", " ") for variant in ours)]
        parts.append(with_source(collection, table(headings, rows), name))
    if all(collection.get(name) is None for name in ("peers", "peers_nominal", "peers_veth")):
        collection.need("peers")
    return "\n\n".join(parts)


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
