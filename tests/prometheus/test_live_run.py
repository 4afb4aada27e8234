"""A real run of four ranks, scraped by a real Prometheus: every panel shows something."""

import json
import math
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhc_dist.observe.dashboards.all_sheets import SHEETS
from mhc_dist.observe.dashboards.sheet import Chart, Number, Unit
from mhc_dist.observe.run_log import read_log
from mhc_dist.observe.top import Target, ask, find_targets
from mhc_dist.pipeline.trace import StepPhase
from tests.debian import require_command

ROOT = Path(__file__).parents[2]
RULES = ("recording_rules.yml", "alerts.yml")
SMALL = (
    "model.num_layers=5",
    "model.hidden_size=32",
    "model.expert_dim=16",
    "data.sequence_length=32",
    "train.steps=1000000",
    "train.validate_every=5",
    "checkpoint.every_steps=10",
    "observe.stability_every=2",
    "deepspeed={csv_monitor: {enabled: true, output_path: OUTPUT, job_name: monitor}}",
)
PATIENCE_SECONDS = 150.0


def free_port(count: int = 1) -> int:
    """The first of `count` consecutive ports that nothing listens on."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
        if port + count < 65536 and all(is_free(port + offset) for offset in range(count)):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def stop(process: subprocess.Popen[Any], request: signal.Signals) -> None:
    process.send_signal(request)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that goes on for as long as the tests need it."""
    output = tmp_path_factory.mktemp("runs")
    settings = [key.replace("OUTPUT", str(output)) for key in SMALL]
    settings += [f"train.output={output}", f"observe.metrics_port={free_port(4)}"]
    command = [sys.executable, "-c", "from mhc_launcher.cli import main; main()", "train"]
    command += [str(ROOT / "configs" / "tiny.yaml"), *(word for key in settings for word in ("--set", key))]
    with (output / "said.log").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            yield output / "tiny"
        finally:
            stop(process, signal.SIGINT)
    assert process.returncode == 83, (output / "said.log").read_text()


@pytest.fixture(scope="module")
def prometheus(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus with our rules that scrapes the run every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "configs" / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["scrape_interval"] = "1s"
    (discovery,) = job["file_sd_configs"]
    discovery["files"] = [str(run_folder.parent / ".targets" / "*.json")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    for name in RULES:
        rules = yaml.safe_load((ROOT / "configs" / "prometheus" / name).read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
        (folder / name).write_text(yaml.safe_dump(rules))
    port = free_port()
    command = [
        require_command("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "said.log").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process, signal.SIGTERM)


def query(server: str, expression: str) -> list[float]:
    """Values of an instant query."""
    address = f"{server}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(address, timeout=10) as answer:
        content = json.load(answer)
    assert content["status"] == "success", content
    return [float(series["value"][1]) for series in content["data"]["result"]]


def wait_for_values(server: str, expression: str, deadline: float) -> list[float]:
    """Values of the expression once there are some and all are finite."""
    values: list[float] = []
    while time.monotonic() < deadline:
        try:
            values = query(server, expression)
        except OSError:
            values = []  # the server is still starting
        if values and all(math.isfinite(value) for value in values):
            return values
        time.sleep(0.5)
    raise AssertionError(f"{expression} has {values or 'no value'}")


def in_range(panel: Number | Chart, value: float) -> bool:
    match panel.unit:
        case Unit.SHARE:
            return -0.01 <= value <= 1.01
        case Unit.SECONDS:
            return 0 <= value < 600
        case _:
            return 0 <= value < 1e15


@pytest.mark.timeout(400)
def test_every_panel_shows_something_of_a_real_run(prometheus: str, run_folder: Path) -> None:
    """Oracle: Prometheus's answers: not empty, finite, and within what the panel's unit allows."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for sheet in SHEETS:
        for row in sheet.rows:
            for panel in row.panels:
                for asked in (panel.query,) if isinstance(panel, Number) else panel.queries:
                    expression = asked.expression.replace("$run", run_folder.name)
                    for value in wait_for_values(prometheus, expression, deadline):
                        assert in_range(panel, value), f"{sheet.title}, {panel.title}: {value}"


@pytest.mark.timeout(400)
def test_phase_seconds_add_up_to_wall_time(prometheus: str, run_folder: Path) -> None:
    """Oracle: the wall clock between two steps, which the rank exports beside its phases; within 1 %."""
    wait_for_values(prometheus, "run:mhc_step_seconds:mean", time.monotonic() + PATIENCE_SECONDS)
    targets = find_targets(run_folder)
    before = [read_series(target) for target in targets]
    for target, first in zip(targets, before, strict=True):
        last = read_when_seconds_later(target, first, 5.0)
        wall = last["mhc_last_step_timestamp_seconds"] - first["mhc_last_step_timestamp_seconds"]
        phases = [f'mhc_step_phase_seconds_total{{phase="{phase.value}"}}' for phase in StepPhase]
        assert all(last[phase] >= first[phase] for phase in phases)
        assert sum(last[phase] - first[phase] for phase in phases) == pytest.approx(wall, rel=0.01)
        assert len(last) < 200


def read_when_seconds_later(target: Target, first: dict[str, float], seconds: float) -> dict[str, float]:
    """The series once the last step ended at least so long after that of `first`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    end = "mhc_last_step_timestamp_seconds"
    while (last := read_series(target))[end] < first[end] + seconds:
        assert time.monotonic() < deadline, f"no step ended in {PATIENCE_SECONDS} s"
        time.sleep(0.2)
    return last


def read_series(target: Target) -> dict[str, float]:
    lines = [line for line in scrape(target.address).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.timeout(400)
def test_the_exposition_passes_promtool(prometheus: str, run_folder: Path) -> None:
    """Oracle: `promtool check metrics` on what a live rank answers."""
    wait_for_values(prometheus, "run:mhc_step_seconds:mean", time.monotonic() + PATIENCE_SECONDS)
    for target in find_targets(run_folder):
        command = [require_command("promtool"), "check", "metrics"]
        done = subprocess.run(
            command, input=scrape(target.address), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(400)
def test_top_hears_every_rank(prometheus: str, run_folder: Path) -> None:
    """Oracle: four ranks of a two by two layout, each in some action of a step."""
    wait_for_values(prometheus, "run:mhc_ranks:count == 4", time.monotonic() + PATIENCE_SECONDS)
    answers = ask(find_targets(run_folder))
    places = [(answer["rank"], answer["stage"], answer["data_rank"]) for answer in answers if answer]
    assert places == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
    assert all(answer["action"] and answer["action_seconds"] < 60 for answer in answers if answer)


@pytest.mark.timeout(400)
def test_monitors_of_deepspeed_get_the_figures(prometheus: str, run_folder: Path) -> None:
    """Oracle: the run's own log, against the CSV files that DeepSpeed's monitor wrote."""
    wait_for_values(prometheus, "run:mhc_step_seconds:mean", time.monotonic() + PATIENCE_SECONDS)
    losses = {record["step"]: record["loss"] for record in read_log(run_folder)}
    (written,) = run_folder.parent.glob("monitor/Train_loss.csv")
    rows = [line.split(",") for line in written.read_text().splitlines()[1:]]
    assert rows
    assert all(losses[int(step)] == pytest.approx(float(loss)) for step, loss in rows)


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        content: bytes = answer.read()
    return content.decode()
