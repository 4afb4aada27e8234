"""Charts and numbers put into one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from mhc_dist.observe.report.charts import WIDTH, Chart
from mhc_dist.observe.report.ink import png, svg

WIDE = 10.5


@dataclass(frozen=True)
class Figure:
    """A number at the head of the page."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """How the run ended."""

    word: str
    good: bool


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Page:
    """What a page shows, from the top. Charts named in `wide` take its whole width."""

    title: str
    subtitle: str
    charts: Sequence[Chart]
    verdict: Verdict | None = None
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    config: str = ""
    wide: frozenset[str] = field(default_factory=lambda: frozenset({"loss", "timeline"}))


def write_page(page: Page, path: Path, pictures: Path | None = None) -> None:
    """Write the page to `path`, whole or not at all, and its charts as PNGs into `pictures`."""
    environment = Environment(
        loader=PackageLoader("mhc_dist.observe.report", "."),
        autoescape=select_autoescape(("html.j2",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    drawn = []
    for chart in page.charts:
        wide = chart.slug in page.wide
        width = WIDE if wide else WIDTH
        drawn.append(
            {
                "title": chart.title,
                "text": chart.text,
                "wide": wide,
                "svg": svg(chart.draw, width, chart.height, chart.title),
            }
        )
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            png(chart.draw, width, chart.height, pictures / f"{chart.slug}.png")
    text = environment.get_template("page.html.j2").render(
        title=page.title,
        subtitle=page.subtitle,
        verdict=page.verdict,
        figures=page.figures,
        tables=page.tables,
        charts=drawn,
        config=page.config,
    )
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
