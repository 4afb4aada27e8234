"""The report of a run, made from a folder like the one a run leaves."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mhc_launcher.cli import app, main
from typer.testing import CliRunner

from mhc_dist.config import dump_config, load_config
from mhc_dist.observe.metrics import CommOp, CommUse, RankStep
from mhc_dist.observe.rank_log import RankLog, read_rank_logs
from mhc_dist.observe.report.build import write_comparison, write_report
from mhc_dist.observe.report.run_record import read_run
from mhc_dist.observe.report.thin import thin
from mhc_dist.observe.report.timeline import planned_events
from mhc_dist.observe.run_log import RunLog
from mhc_dist.observe.stability_log import composite_gains
from mhc_dist.pipeline.perfetto import write_events
from mhc_dist.pipeline.trace import StepPhase
from tests.debian import require_command

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"


def make_run(folder: Path, num_steps: int = 30, **overrides: Any) -> Path:
    """A run's folder with a falling loss, two ranks and a summary."""
    folder.mkdir(parents=True)
    changes = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    (folder / "config.yaml").write_text(dump_config(load_config(TINY, changes)))
    with RunLog.create(folder) as log:
        for step in range(1, num_steps + 1):
            record: dict[str, Any] = {
                "step": step,
                "loss": 5.0 / step + 2.0,
                "grad_norm": 1.0 + 1.0 / step,
                "learning_rate": 1e-3,
                "tokens_per_second": 1000.0 + step % 7,
                "step_seconds": 1.0,
                "expert_load_max_to_mean": 1.5,
            }
            if step % 10 == 0:
                record["validation_loss"] = 2.5
            log.append(record)
    for rank in range(2):
        rank_log = RankLog(folder, rank, rank)
        for step in range(1, num_steps + 1):
            rank_log.step(step, rank_step())
        rank_log.flush()
    (folder / "summary.json").write_text(json.dumps({"run": "r", "bigram_loss": 2.4}))
    return folder


def rank_step() -> RankStep:
    return RankStep(
        seconds=1.0,
        phase_seconds={StepPhase.FORWARD: 0.4, StepPhase.BACKWARD: 0.5, StepPhase.BUBBLE: 0.1},
        comm={CommOp.P2P: CommUse(0.1, 0.1, 100)},
        memory_allocated_bytes=2**20,
        memory_peak_bytes=2**21,
    )


def test_a_page_shows_what_the_run_recorded(tmp_path: Path) -> None:
    """Oracle: the figures written into the folder."""
    page = write_report(make_run(tmp_path / "demo"))
    text = page.read_text()
    for words in (
        "demo",
        "complete",
        "2.167",
        "2.500",
        "2.400",
        "Where the time went",
        "Memory",
        "dualpipev",
    ):
        assert words in text, words
    assert text.count("<svg") == 7
    pictures = {path.stem for path in (page.parent / "report").glob("*.png")}
    assert {"loss", "grad-norm", "phases", "memory"} <= pictures
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)', text), "a page that needs other files"
    assert "<script" not in text


def test_the_timeline_shows_a_step_as_planned_and_as_measured(tmp_path: Path) -> None:
    """Oracle: a plan played back as if it had been measured: two rows of equal bars."""
    run = make_run(tmp_path / "traced")
    planned = planned_events(read_run(run))
    assert {event.rank for event in planned} == {0, 1}
    measured = [
        replace(event, rank=2 * event.rank, start=event.start + 5, end=event.end + 5) for event in planned
    ]
    (run / "trace").mkdir()
    write_events(measured, run / "trace" / "step_7.json", {"step": 7})
    text = write_report(run).read_text()
    assert "measured, step 7" in text
    assert "planned" in text
    assert text.count("stage 1, rank 2") == 1
    without_plan = make_run(tmp_path / "unplaced", schedule__cluster="null")
    assert planned_events(read_run(without_plan)) == []


def test_a_plan_that_cannot_be_made_anew_is_said_to_be_missing(tmp_path: Path) -> None:
    """Oracle: the same trace, its cluster file gone: the step is drawn alone, and the page says why."""
    run = make_run(tmp_path / "moved")
    planned = planned_events(read_run(run))
    (run / "trace").mkdir()
    write_events(planned, run / "trace" / "step_7.json", {"step": 7})
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("cluster: laptop", "cluster: gone_since"))
    text = write_report(run).read_text()
    assert "measured, step 7" in text
    assert "Its plan cannot be made anew" in text
    assert "gone_since" in text


def test_commands_end_with_the_page_or_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what the pages' own functions write; exit code 2 for what is no run."""
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", num_steps=20)
    runner = CliRunner()
    reported = runner.invoke(app, ["report", str(first)])
    assert reported.output.strip() == str(first / "report.html")
    page = tmp_path / "both.html"
    compared = runner.invoke(app, ["compare", str(first), str(second), "--output", str(page)])
    assert compared.exit_code == 0, compared.output
    assert page.exists()
    assert "2.1667" in compared.output
    for command in ("report", "top"):
        monkeypatch.setattr(sys, "argv", ["mhc-dist", command, str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2


def test_ten_thousand_steps_stay_small_and_fast(tmp_path: Path) -> None:
    """Oracle: the promise, 5 MB; ten seconds of this thread's own time, however busy the machine."""
    run = make_run(tmp_path / "long", num_steps=10_000)
    start = time.thread_time()
    page = write_report(run)
    assert time.thread_time() - start < 10.0
    assert page.stat().st_size < 5e6


def test_a_run_that_was_cut_off_still_has_its_report(tmp_path: Path) -> None:
    """Oracle: the same run with half a line in every file, unknown keys, and no summary."""
    run = make_run(tmp_path / "cut")
    (run / "summary.json").write_text('{"run": "cu')
    (run / "metrics.jsonl").open("a").write('{"step": 31, "lo')
    (run / "ranks" / "rank_0.jsonl").open("a").write('{"step"')
    (run / "config.yaml").write_text("model: {of_an_earlier_version: 3}\n")
    text = write_report(run).read_text()
    assert "not complete" in text
    assert "of_an_earlier_version" in text


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    """Oracle: the words a user needs."""
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished step"):
        write_report(tmp_path)


def test_comparing_shows_figures_and_differences(tmp_path: Path) -> None:
    """Oracle: two runs that differ in one key."""
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", num_steps=20, optim__peak_learning_rate=0.5)
    page = tmp_path / "comparison.html"
    table = write_comparison([first, second], page)
    assert [row[:3] for row in table.rows] == [("first", "30", "2.1667"), ("second", "20", "2.2500")]
    text = page.read_text()
    assert "optim.peak_learning_rate" in text
    assert "model.hidden_size" not in text
    with pytest.raises(ValueError, match="takes two"):
        write_comparison([first], page)


def test_thinning_keeps_the_spike() -> None:
    """Oracle: one extreme value among ten thousand, and the ends."""
    values = [1.0] * 10_000
    values[7_777] = 50.0
    steps, thinned = thin(range(10_000), values, most=100)
    assert len(steps) <= 100
    assert (7_777, 50.0) in set(zip(steps, thinned, strict=True))
    assert (steps[0], steps[-1]) == (0, 9_999)


def test_stability_is_drawn_for_the_model_and_its_sublayers(tmp_path: Path) -> None:
    """Oracle: the figures written into the stages' logs."""
    run = make_run(tmp_path / "stable")
    (run / "stability").mkdir()
    for stage in range(2):
        sublayer = {"sublayer": stage, "forward_gain": 1.0, "backward_gain": 1.1}
        layers: dict[str, Any] = {"kind": "layers", "step": 20, "stage": stage}
        layers["sublayers"] = [{**sublayer, "row_residual": 1e-6, "column_residual": 0.0}]
        whole = {"kind": "composite", "step": 20, "stage": stage, "forward_gain": 1.0, "backward_gain": 1.1}
        lines = f"{json.dumps(layers)}\n{json.dumps(whole)}\n"
        (run / "stability" / f"stage_{stage}.jsonl").write_text(lines)
    text = write_report(run).read_text()
    assert "Amax gain of the whole model" in text
    assert "After step 20" in text
    assert {"amax-gain", "sublayers"} <= {path.stem for path in (run / "report").glob("*.png")}


def test_gains_multiply_over_stages() -> None:
    """Oracle: by hand; a step that one stage has not recorded is left out."""
    lines = [
        {"kind": "composite", "step": 1, "stage": 0, "forward_gain": 2.0, "backward_gain": 1.0},
        {"kind": "composite", "step": 1, "stage": 1, "forward_gain": 3.0, "backward_gain": 1.5},
        {"kind": "composite", "step": 2, "stage": 0, "forward_gain": 9.0, "backward_gain": 9.0},
    ]
    assert composite_gains(lines) == {"forward": {1: 6.0}, "backward": {1: 1.5}}


def test_rank_logs_add_up_and_resume_where_the_checkpoint_was(tmp_path: Path) -> None:
    """Oracle: sums by hand; lines beyond the step resumed from are gone."""
    log = RankLog(tmp_path, rank=3, stage=1)
    for step in range(1, 26):
        log.step(step, rank_step())
    log.flush()
    (times,) = read_rank_logs(tmp_path)
    assert (times.rank, times.stage) == (3, 1)
    assert [(line["step"], line["num_steps"]) for line in times.lines] == [(10, 10), (20, 10), (25, 5)]
    assert times.lines[0]["phase_seconds"]["forward"] == pytest.approx(4.0)
    assert times.lines[0]["sent_bytes"] == {"p2p": 1000}
    RankLog(tmp_path, rank=3, stage=1, first_step=20)
    (times,) = read_rank_logs(tmp_path)
    assert [line["step"] for line in times.lines] == [10, 20]


def browse(page: Path, *flags: str) -> tuple[str, str]:
    """The page's DOM after it was rendered, and what the browser's console said."""
    profile = page.parent / "browser"
    command = [
        require_command("chromium"),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={profile}", "--dump-dom", *flags),
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.parametrize(("scheme", "ground"), [("light", "252, 252, 251"), ("dark", "20, 23, 26")])
def test_a_browser_shows_it_light_and_dark_and_on_a_phone(tmp_path: Path, scheme: str, ground: str) -> None:
    """Oracle: headless Chromium: colours it computed, no console message, no sideways scrolling."""
    page = write_report(make_run(tmp_path / "demo"))
    probe = (
        "<script>addEventListener('load', () => { const s = getComputedStyle(document.body);"
        "document.body.dataset.seen = [s.backgroundColor, document.documentElement.scrollWidth <= innerWidth,"
        "getComputedStyle(document.querySelector('svg text')).fill === s.color].join('|') })</script>"
    )
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", probe + "</body>"))
    flags = ["--force-dark-mode"] if scheme == "dark" else []
    dom, console = browse(probed, "--window-size=500,900", *flags)
    assert console == ""
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None
    assert found[1] == f"rgb({ground})|true|true"
