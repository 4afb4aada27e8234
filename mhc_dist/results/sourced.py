"""A table of the page and the lines that say where its figures come from."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import provenance


def with_source(collection: Collection, text: str, *names: str) -> str:
    """`text` and where its figures come from."""
    lines = [
        provenance(file, f"results/{file.path.relative_to(collection.folder)}")
        for name in names
        if (file := collection.get(name)) is not None
    ]
    return "\n\n".join([text, "<br>\n".join(lines)])
