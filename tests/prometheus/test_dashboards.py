"""The committed dashboards: as generated, every query well-formed and about series that exist."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest

from mhc_dist.observe.dashboards.all_sheets import SHEETS
from mhc_dist.observe.dashboards.grafana import to_json
from mhc_dist.observe.dashboards.sheet import Query, Sheet
from mhc_dist.observe.metrics import RankLabels, TrainMetrics, Work

CONFIGS = Path(__file__).parents[2] / "configs"
QUERIES = [
    pytest.param(query, id=f"{sheet.uid}-{query.expression}") for sheet in SHEETS for query in sheet.queries()
]


def committed(sheet: Sheet) -> Path:
    return CONFIGS / "grafana" / "dashboards" / f"{sheet.uid}.json"


def known_series() -> set[str]:
    """What a rank exports and what the rules record."""
    labels = RankLabels(global_rank=0, node="n", pp_stage=0, dp_rank=0, ep_rank=0)
    exported = generate_latest(TrainMetrics(labels, reports_run=True, work=Work(1, 1.0)).registry).decode()
    rules = yaml.safe_load((CONFIGS / "prometheus" / "recording_rules.yml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"]}
    return set(re.findall(r"^# TYPE (\S+)", exported, re.M)) | recorded | {"up", "ALERTS"}


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.uid)
def test_committed_dashboards_are_those_of_the_code(sheet: Sheet) -> None:
    """Oracle: a second generation. To repair: python -m mhc_dist.observe.dashboards."""
    assert committed(sheet).read_text() == to_json(sheet)


def test_no_dashboard_is_left_over() -> None:
    """Oracle: the list of sheets."""
    folder = CONFIGS / "grafana" / "dashboards"
    assert {path.name for path in folder.iterdir()} == {committed(sheet).name for sheet in SHEETS}


@pytest.mark.parametrize("query", QUERIES)
def test_queries_parse_and_ask_for_the_chosen_run(query: Query) -> None:
    """Oracle: Prometheus's grammar, in another implementation of it; the series a rank exports."""
    expression = promql_parser.parse(query.expression)
    assert expression is not None
    assert 'run="$run"' in query.expression
    selectors = re.findall(r"\b([a-z_]+:mhc_\w+:\w+|mhc_\w+|up|ALERTS)\b(?=\{| *$|\))", query.expression)
    assert selectors
    assert set(selectors) <= known_series()


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.uid)
def test_targets_of_a_panel_have_ids_of_their_own(sheet: Sheet) -> None:
    """Oracle: Grafana shows only one of several targets with one ref id."""
    panels: list[dict[str, Any]] = json.loads(committed(sheet).read_text())["panels"]
    for panel in panels:
        references = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(references)) == len(references), panel["title"]


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: sheet.uid)
def test_panels_do_not_overlap(sheet: Sheet) -> None:
    """Oracle: every cell of Grafana's 24 columns belongs to one panel at most."""
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(committed(sheet).read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
