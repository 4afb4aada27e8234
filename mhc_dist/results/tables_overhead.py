"""What hyper-connections cost in steps that ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


def overhead_measured(collection: Collection) -> str:
    """One column a width, one row a part of the step."""
    names = ("overhead_256", "overhead_512", "overhead_1280")
    files = {name: file for name in names if (file := collection.get(name)) is not None}
    if not files:
        collection.need(names[-1])
    figures = [file.figures for file in files.values()]

    def row(title: str, value: Callable[[Any], str]) -> list[str]:
        return [title, *(value(of) for of in figures)]

    rows = [
        row("overhead", lambda of: f"**{shown(of['overhead_ratio'], '+%')}**"),
        row("95 % interval", lambda of: " to ".join(shown(end, "+%") for end in of["overhead_interval"])),
        *(
            row(f"of it {part}", lambda of, part=part: shown(of["breakdown"].get(part, 0.0), "+%"))  # type: ignore[misc]
            for part in ("forward", "backward", "recompute", "weight_grad")
        ),
    ]
    text = table(["measured, share of the plain step", *(f"C = {of['hidden_size']}" for of in figures)], rows)
    lines = [text, *(f"\n*{name}: {collection.missing(name)}.*" for name in names if name not in files)]
    return with_source(collection, "\n".join(lines), *files)
