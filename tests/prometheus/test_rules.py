"""The recording rules and alerts, run by Prometheus's own tool over synthetic series."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.debian import require_command

CONFIGS = Path(__file__).parents[2] / "configs" / "prometheus"
RULES_TEST = Path(__file__).with_name("rules_test.yml")


def promtool(*arguments: str | Path) -> None:
    command = [require_command("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules(file: str) -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((CONFIGS / file).read_text())["groups"] for rule in group["rules"]
    ]


def test_files_are_valid() -> None:
    """Oracle: promtool, with its lint (duplicate rules) fatal."""
    promtool("check", "config", CONFIGS / "prometheus.yml")
    promtool(
        "check",
        "rules",
        "--lint=all",
        "--lint-fatal",
        CONFIGS / "recording_rules.yml",
        CONFIGS / "alerts.yml",
    )


def test_rules_over_synthetic_series() -> None:
    """Oracle: values by hand in rules_test.yml."""
    promtool("test", "rules", RULES_TEST)


@pytest.mark.parametrize("rule", rules("recording_rules.yml"), ids=lambda rule: rule["record"])
def test_every_recording_rule_has_an_expected_value(rule: dict[str, Any]) -> None:
    """Oracle: the synthetic tests themselves; a rule without one could be wrong unseen."""
    assert re.search(rf"expr: .*{re.escape(rule['record'])}\b", RULES_TEST.read_text())


@pytest.mark.parametrize("rule", rules("alerts.yml"), ids=lambda rule: rule["alert"])
def test_every_alert_fires_in_a_test_and_carries_its_runbook(rule: dict[str, Any]) -> None:
    """Oracle: an expected firing in the synthetic tests; the texts a person woken at night needs."""
    text = RULES_TEST.read_text()
    fires = (
        f'alertname="{rule["alert"]}",alertstate="firing"' in text or f"alertname: {rule['alert']}\n" in text
    )
    assert fires
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert all(len(rule["annotations"][key]) > 30 for key in ("summary", "description", "runbook"))


def test_alerts_read_series_that_a_rank_exports_or_a_rule_records() -> None:
    """Oracle: the metric names of mhc_dist.observe and the record names: a renamed series breaks an alert."""
    from prometheus_client import generate_latest

    from mhc_dist.observe.metrics import RankLabels, TrainMetrics, Work

    labels = RankLabels(global_rank=0, node="n", pp_stage=0, dp_rank=0, ep_rank=0)
    exported = generate_latest(TrainMetrics(labels, reports_run=True, work=Work(1, 1.0)).registry).decode()
    known = set(re.findall(r"^# TYPE (\S+)", exported, re.M))
    known |= {name + suffix for name in known for suffix in ("_sum", "_count", "_bucket")}
    known |= {rule["record"] for rule in rules("recording_rules.yml")} | {"up"}
    for rule in [*rules("recording_rules.yml"), *rules("alerts.yml")]:
        for name in re.findall(r"\b(?:(?:run|rank|stage):mhc_\w+:\w+|mhc_\w+)", rule["expr"]):
            assert name in known, f"{rule.get('record', rule.get('alert'))} reads {name}"
