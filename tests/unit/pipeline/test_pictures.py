"""Pictures, pages and traces of schedules, and the command that makes them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mhc_launcher.cli import app
from typer.testing import CliRunner

from mhc_dist.pipeline.bars import bars, lanes
from mhc_dist.pipeline.demonstration import demonstrate
from mhc_dist.pipeline.page import write_html
from mhc_dist.pipeline.perfetto import read_events, simulated_events, write_perfetto
from mhc_dist.pipeline.schedules.registry import SCHEDULES, make_schedule
from mhc_dist.pipeline.validate import validate


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_demonstrations_are_safe_and_complete(name: str) -> None:
    """Oracle: the validator; and bars of a lane of a rank never overlap."""
    shown = demonstrate(make_schedule(name, 4, 8), wire=0.25, recompute=0.25)
    validate(shown.program)
    drawn = bars(shown.simulation)
    assert lanes(drawn) == ["compute", "all-to-all", "p2p"]
    for rank in range(4):
        for lane in lanes(drawn):
            own = sorted((bar.start, bar.end) for bar in drawn if (bar.rank, bar.lane) == (rank, lane))
            assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(own))


def test_trace_round_trip(tmp_path: Path) -> None:
    """Oracle: the events that were written; and the file is a Chrome trace."""
    shown = demonstrate(make_schedule("dualpipev", 2, 4), wire=0.25)
    write_perfetto(shown, tmp_path / "trace.json")
    read = read_events(tmp_path / "trace.json")
    written = simulated_events(shown)
    assert [(e.rank, e.action, e.lane) for e in read] == [(e.rank, e.action, e.lane) for e in written]
    assert [e.end for e in read] == pytest.approx([e.end for e in written])
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {row["ph"] for row in rows} >= {"X", "M"}


def test_page_shows_every_bar(tmp_path: Path) -> None:
    """Oracle: the bars; the drawing is well-formed XML with one titled rectangle each."""
    shown = demonstrate(make_schedule("zbv", 2, 4), wire=0.25)
    write_html(shown, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    drawing = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    assert len(list(drawing)) == len(bars(shown.simulation))
    assert all(rectangle.find("title") is not None for rectangle in drawing)


def test_command_prints_figures_and_draws(tmp_path: Path) -> None:
    """Oracle: the design note's figures for P = 4, M = 16; PNG's signature."""
    result = CliRunner().invoke(
        app,
        [
            *("schedule", "dualpipev", "--ranks", "4", "--microbatches", "16"),
            *("--unit-costs", "--recompute-cost", "0.25", "--json"),
            *("--png", str(tmp_path / "a.png"), "--html", str(tmp_path / "a.html")),
            *("--trace", str(tmp_path / "a.json")),
        ],
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.output.splitlines()[-1])
    assert content["makespan"] == 52.125
    assert len(content["idle_per_rank"]) == 4
    assert content["peak_live_microbatches"] == [4.5] * 4
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["2f2b"], "Known schedules: 1f1b"),
        (["dualpipev", "--ranks", "4", "--microbatches", "4"], "at least 8"),
        (["1f1b", "--recompute-cost", "-1"], "cannot be negative"),
        (["1f1b", "--png", "nowhere/at/all.png"], "there is no folder nowhere/at"),
        (["dualpipev", "--ranks", "2", "--microbatches", "1"], "to at least 4, or use 1f1b"),
    ],
)
def test_command_refuses_bad_input(arguments: list[str], reason: str) -> None:
    """Oracle: the reasons written here by hand."""
    result = CliRunner().invoke(app, ["schedule", *arguments])
    assert isinstance(result.exception, ValueError)
    assert reason in str(result.exception)


def test_plan_command_ends_with_json() -> None:
    """Oracle: the promised keys."""
    configs = Path(__file__).parents[3] / "configs"
    result = CliRunner().invoke(
        app,
        [
            "plan",
            str(configs / "tiny.yaml"),
            "--cluster",
            str(configs / "clusters" / "laptop.yaml"),
            *("--without", "overlap", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.output.splitlines()[-1])
    assert content["without"].keys() == {"overlap"}
    assert content["pipeline"] * content["data"] == 2
    assert set(content["overhead_breakdown"]) == {
        "kernels", "recompute", "p2p", "memory_forced", "layout"
    }  # fmt: skip
