"""What writes result files for the page: kept runs, planned cells, the list of commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mhc_dist.config import load_config
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.evaluate import evaluate
from mhc_dist.plan.layout import Layout
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.weak_scaling import series
from mhc_dist.results import keep, plans, rerun
from mhc_dist.results.meshes import mesh_figures
from mhc_dist.results.result_file import read_result
from mhc_dist.results.source import load_source
from mhc_dist.results.starting import starting_figures


def test_a_finished_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the run's own summary and curve."""
    run, results = tmp_path / "runs" / "small", tmp_path / "results"
    run.mkdir(parents=True)
    (run / "loss.png").write_bytes(b"picture")
    assert keep.main([str(run), "--results", str(results)]) == 2
    assert "only a run that reached its last step can be kept" in capsys.readouterr().err
    (run / "summary.json").write_text('{"run": "small", "validation_loss": 2.5}')
    assert keep.main([str(run), "--results", str(results)]) == 0
    kept = read_result(results / "small.json")
    assert kept.command == "mhc-dist train configs/small.yaml"
    assert kept.figures["validation_loss"] == 2.5
    assert (results / "small_loss.png").read_bytes() == b"picture"


def test_what_is_measured_again_is_chosen_by_name_file_and_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: page.yaml's own list; of two files one is of this commit. A wrong name is told with others."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(rerun, "conditions", lambda: {"commit": "now"})
    for name, commit in (("memory", "now"), ("scaling", "before")):
        conditions = {"commit": commit, "processor": "P", "cores": 2, "load_average": [0.5], "time": "t"}
        content = {"command": "x", "label": "y", "conditions": conditions, "figures": {}}
        (results / f"{name}.json").write_text(json.dumps(content))

    def listed(*arguments: str) -> list[str]:
        assert rerun.main([*arguments, "--list"]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    everything = [*load_source().results, "plans"]
    assert listed() == everything
    assert listed("--missing") == [name for name in everything if name not in ("memory", "scaling")]
    assert listed("--outdated") == [name for name in everything if name != "memory"]
    assert listed("memory", "plans") == ["memory", "plans"]
    assert rerun.main(["memroy"]) == 2
    assert "no result is called memroy: choose from tiny, " in capsys.readouterr().err


def test_measuring_again_tells_what_failed_and_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: small programs that write, print, fail, write nothing, or are none; and what files hold."""
    write, printed = tmp_path / "write.json", tmp_path / "kernels" / "printed.json"
    kept = tmp_path / "kept.json"
    kept.write_text("old")

    def part(name: str, program: str, path: Path | None, *, prints: bool = False) -> rerun.Part:
        return rerun.Part(name, program, program, path, prints)

    python = "python -c"
    chosen = [
        part("fails", f"{python} 'raise SystemExit(3)' && touch {tmp_path}/never", tmp_path / "never"),
        part("writes", f"touch {write}", write),
        part("prints", f"{python} 'print(5)'", printed, prints=True),
        part("cut", f"{python} 'print(chr(123))'", kept, prints=True),
        part("nothing", "true", write),
        part("no_program", "mhc-no-such-program", write),
        part("cells", "true", None),
    ]
    assert rerun.run_all(chosen) == 1
    said = capfd.readouterr().err
    assert said.splitlines()[-1] == "mhc-dist: failed: fails, cut, nothing, no_program"
    assert "ended with code 3" in said
    assert f"nothing: wrote no {write}" in said
    assert "cut: printed no JSON" in said
    assert write.is_file()
    assert not (tmp_path / "never").exists()
    assert (printed.read_text(), kept.read_text()) == ("5\n", "old")

    def interrupted(part: rerun.Part) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rerun, "run", interrupted)
    assert rerun.run_all(chosen) == 83
    assert "--outdated` goes on" in capfd.readouterr().err


def test_recomputing_frees_memory_and_costs_time() -> None:
    """Oracle: the same layout of the 3B model that keeps everything: it holds more, and is faster."""
    config = load_config(plans.CONFIGS / "paper_3b.yaml")
    machine = Machine(load_cluster("h800"))
    kept = evaluate(config, machine, Layout("dualpipev", 1, 1, 4, 5, boundaries=(0, 6, 12), sequences=1))
    plan = {
        "schedule": "dualpipev",
        "pipeline": 1,
        "expert": 1,
        "data": 4,
        "num_microbatches": 5,
        "boundaries": [0, 6, 12],
        "sequences_per_microbatch": 1,
        "step_seconds": kept.step_seconds,
        "peak_memory_bytes": kept.peak_bytes,
    }
    again = plans.recomputing(config, machine, plan)
    assert again["freed_bytes"] > 0
    assert 0 < again["slower"] < 0.1


def test_planned_cells_are_not_planned_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file's time of change, before and after the second call; a bad name is told in one line."""
    # One processor: so small a search is not worth starting others for.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    arguments = ["--models", "tiny", "--clusters", "laptop", "--gpus", "2", "--results", str(tmp_path)]
    assert plans.main(arguments) == 0
    path = tmp_path / "plans" / "tiny_laptop_2.json"
    figures = read_result(path).figures
    plan = figures["plan"]
    assert (1 + plan["overhead_ratio"]) * figures["plain"]["step_seconds"] == pytest.approx(
        plan["step_seconds"]
    )
    assert sum(plan["overhead_breakdown"].values()) == pytest.approx(plan["overhead_ratio"])
    overlap = figures["without"]["overlap"]
    assert overlap["slower"] == pytest.approx(overlap["step_seconds"] / plan["step_seconds"] - 1)
    again = figures["recomputing"]
    assert again["peak_memory_bytes"] + again["freed_bytes"] == plan["peak_memory_bytes"]
    assert again["slower"] == pytest.approx(again["step_seconds"] / plan["step_seconds"] - 1)
    changed = path.stat().st_mtime_ns
    assert plans.main(arguments) == 0
    assert path.stat().st_mtime_ns == changed
    assert "1 of 1 cells are there already" in capsys.readouterr().out
    assert plans.main([*arguments, "--clusters", "moon"]) == 2
    assert "no cluster file" in capsys.readouterr().err


def test_series_keep_every_rank_its_work() -> None:
    """Oracle: layers and microbatches per pipeline rank, which weak scaling holds constant."""
    points = list(series())
    assert {p.devices for p in points if p.series == "deeper"} == {2**k for k in range(3, 13)}
    assert max(p.devices for p in points if p.series == "wider") == 4096
    for point in points:
        if point.num_layers is not None:
            assert point.num_layers == 4 * point.pipeline
        assert point.num_microbatches == 4 * point.pipeline


def test_what_a_start_costs() -> None:
    """Oracle: groups counted by hand for 8 pipeline and 8 data ranks; sockets to every rank but oneself."""
    figures = starting_figures(64)
    # One expert group a stage, twice; one data group a stage; 2 x 7 channels in each of 8 columns.
    assert figures["groups"] == 8 + 8 + 8 + 14 * 8
    assert figures["roll_bytes_served"] == 64 * figures["roll_bytes"]
    (mesh,) = mesh_figures([3])
    assert mesh["ranks"] == 3
    assert mesh["sockets_of_a_rank"] >= 2


def test_an_interrupted_table_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the exit code of what was ended on request, and one line instead of a traceback."""

    def interrupted(cell: plans.Wanted) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plans.Wanted, "plan", interrupted)
    arguments = ["--models", "tiny", "--clusters", "laptop", "--gpus", "2", "--results", str(tmp_path)]
    assert plans.main(arguments) == 83
    assert capsys.readouterr().out.splitlines()[-1].endswith("The same command goes on.")
