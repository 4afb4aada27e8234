"""What a dashboard consists of, as plain data: no Grafana in here, so that tests can read every query.

`$run` in a query is the run chosen at the head of the dashboard.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """Grafana's names of units."""

    NONE = "none"
    COUNT = "short"
    SECONDS = "s"
    SHARE = "percentunit"
    BYTES = "bytes"
    BYTES_PER_SECOND = "Bps"
    PER_SECOND = "cps"
    SCIENTIFIC = "sci"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what its series are called; `{{label}}` in the legend is replaced."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Number:
    """The latest value, large. It turns amber and red from `warn_at` and `fail_at` on."""

    title: str
    unit: Unit
    query: Query
    description: str
    decimals: int | None = None
    warn_at: float | None = None
    fail_at: float | None = None


@dataclass(frozen=True)
class Chart:
    """Values over time. `stacked` for shares of one whole; `limit` draws a line; `log` a logarithmic axis."""

    title: str
    unit: Unit
    queries: tuple[Query, ...]
    description: str
    stacked: bool = False
    log: bool = False
    limit: float | None = None
    width: int = 12
    """Of 24 columns."""


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Number | Chart, ...]


@dataclass(frozen=True)
class Sheet:
    """One dashboard. `uid` is its address in Grafana and its file name."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    def queries(self) -> list[Query]:
        """Every query of every panel, from the top."""
        found: list[Query] = []
        for row in self.rows:
            for panel in row.panels:
                found += [panel.query] if isinstance(panel, Number) else panel.queries
        return found
