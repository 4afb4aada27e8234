"""The planned table: what hyper-connections cost by model, cluster and number of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from mhc_dist.results.collection import Collection, NotMeasuredError
from mhc_dist.results.shown import shown, table

COMMAND = "mhc-dist results plans"
PARTS = {
    "kernels": "kernels",
    "recompute": "recompute",
    "p2p": "streams on the wire",
    "memory_forced": "forced by memory",
    "layout": "another layout",
}
LARGEST_MODEL = "paper_27b"
PUBLISHED_OVERHEAD = 0.067
"""Of the 27B model, n = 4 (mHC paper): nobody's measurement here, hence in no result file."""

MEASURES = ("fusion", "recompute", "overlap")

Key = tuple[str, str, int]


def wanted_cells() -> list[Key]:
    """The table's cells in reading order."""
    from mhc_dist.results.plans import CLUSTERS, MODELS, SIZES

    return [(m, c, n) for m in reversed(MODELS) for n in sorted(SIZES) for c in CLUSTERS]


def planned(collection: Collection) -> dict[Key, Mapping[str, Any]]:
    """Figures of the cells that are there, in reading order; NotMeasuredError if none is."""
    cells = collection.cells
    found = {key: cells[key].figures for key in [*wanted_cells(), *sorted(cells)] if key in cells}
    if not found:
        raise NotMeasuredError(f"not planned yet: run `{COMMAND}`")
    return found


def with_sources(collection: Collection, text: str) -> str:
    """`text`, and where all cells come from."""
    files = [file for key, file in collection.cells.items()]
    commits = ", ".join(dict.fromkeys(file.commit for file in sorted(files, key=lambda f: f.time or "")))
    source = (
        f"<sub>{files[0].label}. `{COMMAND}`, commit {commits}, planned on {files[0].machine} with"
        f" {files[0].cores} cores: one file a cell in [plans](results/plans)</sub>"
    )
    return f"{text}\n\n{source}"


def overhead_planned(collection: Collection) -> str:
    """Model and size by cluster: in the same layout, and against the plain residual's own best."""
    cells = planned(collection)
    clusters = list(dict.fromkeys(cluster for _, cluster, _ in cells))
    rows = []
    for model, devices in dict.fromkeys((model, devices) for model, _, devices in cells):
        row = [model.removeprefix("paper_").upper(), shown(devices, "int")]
        for cluster in clusters:
            row.append(_cell(cells.get((model, cluster, devices))))
        rows.append(row)
    headings = ["model", "GPUs", *(cluster.upper() for cluster in clusters)]
    text = (
        "Planned overhead: **against the plain residual in the same layout** / against its own best one.\n\n"
        + table(headings, rows)
    )
    if any(of["batch_factor"] > 1 for of in cells.values()):
        text += (
            "\n\n(xN): so many devices cannot share the paper's batch equally; planned with N times as much."
        )
    text += f"\n\n{_worst(cells)}"
    missing = [key for key in wanted_cells() if key not in cells]
    if missing:
        text += f"\n\n*{len(missing)} of {len(wanted_cells())} cells are not planned yet: run `{COMMAND}`.*"
    return with_sources(collection, text)


def _worst(cells: Mapping[Key, Mapping[str, Any]]) -> str:
    """How many cells stay below the published figure, and where the largest comes from."""
    plans = {key: of["plan"] for key, of in cells.items() if of["outcome"] == "planned"}
    if not plans:
        return ""
    below = sum(plan["overhead_ratio_same_layout"] <= PUBLISHED_OVERHEAD for plan in plans.values())
    key = max(plans, key=lambda key: plans[key]["overhead_ratio_same_layout"])
    plan = plans[key]
    parts = plan["overhead_breakdown"]
    listed = ", ".join(
        f"{PARTS[name]} {shown(parts[name], '+%')}" for name in ("p2p", "kernels", "recompute")
    )
    large = [
        plan["overhead_ratio_same_layout"] for (model, *_), plan in plans.items() if model == LARGEST_MODEL
    ]
    of_large = (
        f" Of the {len(large)} of the 27B model the median is {shown(median(large), '+%')}, from"
        f" {shown(min(large), '+%')} to {shown(max(large), '+%')}."
        if large
        else ""
    )
    return (
        f"In the same layout, {below} of {len(plans)} are at most {shown(PUBLISHED_OVERHEAD, '+%')}, as"
        f" published for 27B.{of_large} The largest, {shown(plan['overhead_ratio_same_layout'], '+%')}, is"
        f" that of {_title(key)}; of the best plain step there, {listed}."
    )


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return ""
    if figures["outcome"] == "nothing_fits":
        return f"does not fit: {shown(figures['missing_bytes'], 'GB')} too much"
    plan = figures["plan"]
    batch = f" (x{figures['batch_factor']})" if figures["batch_factor"] > 1 else ""
    same, best = plan["overhead_ratio_same_layout"], plan["overhead_ratio"]
    return f"**{shown(same, '+%')}** / {shown(best, '+%')}{batch}"


def overhead_breakdown(collection: Collection) -> str:
    """Every planned cell with its layout and the parts of its overhead against the best plain layout."""
    rows = [
        [
            _title(key),
            of["layout"],
            shown(of["plan"]["step_seconds"], ".4g"),
            shown(of["plan"]["model_flops_utilization"], "%"),
            shown(of["plan"]["bubble_ratio"], "%"),
            shown(of["plan"]["peak_memory_bytes"], "GB"),
            shown(of["plan"]["overhead_ratio"], "+%"),
            *(shown(of["plan"]["overhead_breakdown"][part], "+%") for part in PARTS),
        ]
        for key, of in planned(collection).items()
        if of["outcome"] == "planned"
    ]
    headings = ["", "layout", "step s", "MFU", "bubble", "memory", "overhead", *PARTS.values()]
    return _folded(
        "Where it comes from, cell by cell: the parts add up to the overhead against the best plain layout",
        with_sources(collection, table(headings, rows)),
    )


def overhead_contributions(collection: Collection) -> str:
    """By model, over clusters and sizes: what fusion, recompute and overlap bring."""
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for (model, _, _), of in planned(collection).items():
        if of["outcome"] == "planned":
            by_model.setdefault(model, []).append(of)
    rows = []
    for model, cells in by_model.items():
        again = [of["recomputing"] for of in cells if "recomputing" in of]
        rows.append(
            [
                model.removeprefix("paper_").upper(),
                *(_spread([of["without"][name]["slower"] for of in cells], "+%") for name in MEASURES),
                _spread([one["slower"] for one in again], "+%"),
                _spread([one["freed_bytes"] for one in again], "GB"),
            ]
        )
    headings = [
        "step, median (range) of cells",
        *(f"without {name}" for name in MEASURES),
        "with recompute",
        "memory that frees",
    ]
    text = (
        "What each measure contributes, one switched off at a time in the layout that was chosen: fused\n"
        "kernels of the connections, recomputed streams, exchanges under compute. Layouts that have memory\n"
        "to spare recompute nothing; for those the last two columns switch it on.\n\n" + table(headings, rows)
    )
    return with_sources(collection, text)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "not planned yet"
    middle, least, most = (shown(value, form) for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def overhead_measures(collection: Collection) -> str:
    """What each measure brings: the same layout without it."""
    rows = []
    for key, of in planned(collection).items():
        if of["outcome"] != "planned":
            continue
        row = [_title(key), shown(of["plan"]["overhead_ratio_same_layout"], "+%")]
        for name in MEASURES:
            without = of["without"][name]
            text = f"{shown(without['slower'], '+%')} ({shown(without['overhead_ratio_same_layout'], '+%')})"
            if not without["fits"]:
                text += f", does not fit: {shown(without['peak_memory_bytes'], 'GB')}"
            row.append(text)
        row += [_recomputing(of.get("recomputing")), _keeping(of.get("best_keeping_everything"))]
        rows.append(row)
    headings = [
        "",
        "overhead",
        *(f"without {name}" for name in MEASURES),
        "with recompute",
        "best layout that recomputes nothing",
    ]
    text = (
        "One measure switched off at a time: how much longer the step takes in the same layout (and the"
        " overhead there against the plain residual, for overlap also without it). *With recompute*: streams"
        " regenerated in blocks of so many sublayers, and the memory that this frees.\n\n"
        + table(headings, rows)
    )
    return _folded(
        "What fusion, recomputation and overlap each contribute, cell by cell", with_sources(collection, text)
    )


def _recomputing(of: Mapping[str, Any] | None) -> str:
    if of is None:
        return "not planned yet"
    return f"{shown(of['slower'], '+%')}, blocks of {of['block']} free {shown(of['freed_bytes'], 'GB')}"


def _keeping(of: Mapping[str, Any] | None) -> str:
    if of is None:
        return "is the one chosen"
    if not of["fits"]:
        return f"none fits: {shown(of['missing_bytes'], 'GB')} too much"
    return f"{shown(of['slower'], '+%')}, {of['layout']}"


def overhead_unfit(collection: Collection) -> str:
    """What does not fit, and what would."""
    lines = [
        f"* {_title(key)}: {of['message']}"
        for key, of in planned(collection).items()
        if of["outcome"] == "nothing_fits"
    ]
    return "\n".join(["Does not fit:", "", *lines]) if lines else ""


def _title(key: Key) -> str:
    model, cluster, devices = key
    return f"{model.removeprefix('paper_').upper()}, {devices} {cluster.upper()}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


PLAN_TABLES: dict[str, Callable[[Collection], str]] = {
    "overhead_planned": overhead_planned,
    "overhead_contributions": overhead_contributions,
    "overhead_breakdown": overhead_breakdown,
    "overhead_measures": overhead_measures,
    "overhead_unfit": overhead_unfit,
}
