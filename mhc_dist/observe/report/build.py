"""`mhc-dist report RUN` and `mhc-dist compare RUN RUN...`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mhc_dist.observe.report.charts import (
    Chart,
    gain_chart,
    layer_chart,
    line_chart,
    loss_chart,
    memory_chart,
    phase_chart,
)
from mhc_dist.observe.report.page import Figure, Page, Table, Verdict, write_page
from mhc_dist.observe.report.run_record import RunRecord, read_run
from mhc_dist.observe.report.timeline import timeline_chart

REPORT_FILE = "report.html"
PICTURES_FOLDER = "report"


def write_report(folder: Path) -> Path:
    """Write RUN/report.html, and its pictures as PNGs into RUN/report/; returns the page's path.

    Raises ValueError when `folder` is not the folder of a run that finished a step.
    """
    run = read_run(folder)
    charts = [
        loss_chart([run]),
        line_chart([run], "grad_norm", "Gradient norm", "norm", "Before clipping.", log=True),
        gain_chart(run),
        layer_chart(run),
        phase_chart(run),
        timeline_chart(run),
        line_chart(
            [run],
            "tokens_per_second",
            "Throughput",
            "tokens per second",
            "Of each step, all data ranks together.",
        ),
        line_chart(
            [run],
            "expert_load_max_to_mean",
            "Expert load",
            "fullest over mean",
            "Tokens of the fullest expert over the mean, worst layer on rank 0's stage; 1 is balanced.",
        ),
        memory_chart(run),
        line_chart([run], "learning_rate", "Learning rate", "rate", "Of each step."),
    ]
    page = Page(
        title=run.name,
        subtitle=_subtitle(run),
        charts=_drawn(charts),
        verdict=_verdict(run),
        figures=_figures(run),
        config=run.config_text,
    )
    path = folder / REPORT_FILE
    write_page(page, path, folder / PICTURES_FOLDER)
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Table:
    """Write a page with the runs side by side; returns its table of figures for the terminal.

    Raises ValueError for fewer than two runs, and for a folder that is not a run.
    """
    if len(folders) < 2:
        raise ValueError(
            f"{len(folders)} run given, and comparing takes two or more. Use `mhc-dist report` for one."
        )
    runs = [read_run(folder) for folder in folders]
    charts = [
        loss_chart(runs),
        line_chart(runs, "grad_norm", "Gradient norm", "norm", "Before clipping.", log=True),
        line_chart(runs, "tokens_per_second", "Throughput", "tokens per second", "Of each step."),
        line_chart(runs, "step_seconds", "Step time", "seconds", "Wall time of each step."),
    ]
    figures = comparison_table(runs)
    differences = config_differences(runs)
    names = ", ".join(run.name for run in runs)
    page = Page(
        title=f"Comparison of {len(runs)} runs",
        subtitle=names,
        charts=_drawn(charts),
        tables=[figures, *([differences] if differences.rows else [])],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(page, path)
    return figures


def comparison_table(runs: Sequence[RunRecord]) -> Table:
    """One row per run: where it ended and how fast it was."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        steps, losses = run.series("loss")
        _, validation = run.series("validation_loss")
        rows.append(
            (
                run.name,
                str(steps[-1] if steps else 0),
                f"{losses[-1]:.4f}" if losses else "",
                f"{validation[-1]:.4f}" if validation else "",
                f"{_median(run.series('tokens_per_second')[1]):,.0f}",
                f"{_median(run.series('step_seconds')[1]):.3f}",
            )
        )
    head = ("run", "steps", "last loss", "validation loss", "tokens/s (median)", "step s (median)")
    return Table("Figures", head, rows)


def config_differences(runs: Sequence[RunRecord]) -> Table:
    """Keys whose values are not the same in all runs."""
    flat = [dict(_flat("", run.config)) for run in runs]
    keys = sorted(set().union(*flat))
    rows = []
    for key in keys:
        values = [str(config.get(key, "")) for config in flat]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Table("What their configurations differ in", ("key", *(run.name for run in runs)), rows)


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), below)
    else:
        yield prefix, value


def _drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _verdict(run: RunRecord) -> Verdict:
    if run.summary is not None:
        return Verdict("complete", good=True)
    if run.failure is not None:
        return Verdict(f"failed on rank {run.failure.get('rank')}: {run.failure.get('message')}", good=False)
    return Verdict("not complete", good=False)


def _subtitle(run: RunRecord) -> str:
    parallel, residual = run.config.get("parallel", {}), run.config.get("residual", {})
    schedule = run.config.get("schedule", {})
    facts = [
        f"{residual.get('kind')} with {residual.get('num_streams')} streams" if residual else "",
        _layout(parallel) if parallel else "",
        f"{schedule.get('name')} with {schedule.get('num_microbatches')} microbatches" if schedule else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _layout(parallel: dict[str, Any]) -> str:
    sizes = f"pipeline {parallel.get('pipeline')} x data {parallel.get('data')}"
    return f"{sizes}, experts over {parallel.get('expert')}"


def _figures(run: RunRecord) -> list[Figure]:
    steps, losses = run.series("loss")
    at, validation = run.series("validation_loss")
    planned = run.config.get("train", {}).get("steps")
    figures = [
        Figure("Steps", f"{max(steps, default=0):,}", f"of {planned:,}" if isinstance(planned, int) else ""),
        Figure("Training loss", f"{losses[-1]:.3f}" if losses else "none", "last step, nats per token"),
    ]
    if validation:
        figures.append(Figure("Validation loss", f"{validation[-1]:.3f}", f"after step {at[-1]:,}"))
    baseline = (run.summary or {}).get("bigram_loss")
    if isinstance(baseline, float):
        figures.append(Figure("Bigram baseline", f"{baseline:.3f}", "same validation text"))
    figures += [
        Figure(
            "Throughput", f"{_median(run.series('tokens_per_second')[1]):,.0f}", "tokens per second, median"
        ),
        Figure("Step time", f"{_median(run.series('step_seconds')[1]):.2f} s", "median"),
    ]
    return figures


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else float("nan")
