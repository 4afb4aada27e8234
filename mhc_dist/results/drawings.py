"""Pictures of the page, each from result files alone. White ground, so that they are readable on any page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mhc_dist.results.collection import Collection
from mhc_dist.results.tables_plans import MEASURES, PUBLISHED_OVERHEAD, planned

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#7a7a7a")
"""Okabe and Ito's, which colour-blind readers tell apart."""

Draw = Callable[[Collection], Figure]


def overhead(collection: Collection) -> Figure:
    """A panel a model, a group of bars a size, a bar a cluster: overhead in the same layout."""
    cells = planned(collection)
    models = list(dict.fromkeys(model for model, _, _ in cells))
    clusters = list(dict.fromkeys(cluster for _, cluster, _ in cells))
    figure, axes = _panels(len(models), width=10.0, height=3.4)
    for axis, model in zip(axes, models, strict=True):
        sizes = sorted({devices for name, _, devices in cells if name == model})
        for number, cluster in enumerate(clusters):
            for place, devices in enumerate(sizes):
                of = cells.get((model, cluster, devices))
                if of is None:
                    continue
                left = place + 0.26 * (number - (len(clusters) - 1) / 2)
                if of["outcome"] == "nothing_fits":
                    axis.text(
                        left,
                        0.15,
                        "does not fit",
                        rotation=90,
                        ha="center",
                        va="bottom",
                        fontsize=7,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                    )
                    continue
                value = 100 * of["plan"]["overhead_ratio_same_layout"]
                axis.bar(left, value, width=0.24, color=COLOURS[number], label=cluster.upper())
        axis.axhline(100 * PUBLISHED_OVERHEAD, color="#444444", lw=1, ls="--", label="published, 27B")
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlim(-0.6, len(sizes) - 0.4)  # room for bars that are missing
        _titled(axis, model.removeprefix("paper_").upper(), "GPUs")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, 1.35 * top)  # the legend above all bars
    axes[0].set_ylabel("step longer than plain residual's, %\n(same layout, simulated)")
    _legend(axes[-1])
    return figure


def measures(collection: Collection) -> Figure:
    """A panel a measure, a group a model and size on H800: how much longer the step is without it."""
    cells = {
        key: of for key, of in planned(collection).items() if of["outcome"] == "planned" and key[1] == "h800"
    }
    models = list(dict.fromkeys(model for model, _, _ in cells))
    cells = dict(sorted(cells.items(), key=lambda cell: (models.index(cell[0][0]), cell[0][2])))
    figure, (axis,) = _panels(1, width=10.0, height=3.2)
    unfit = False
    names = [name for name in MEASURES if any(of["without"][name]["slower"] for of in cells.values())]
    for number, name in enumerate(names):
        for place, of in enumerate(cells.values()):
            without = of["without"][name]
            left = place + 0.27 * (number - (len(names) - 1) / 2)
            value = 100 * without["slower"]
            axis.bar(
                left,
                value,
                width=0.25,
                color=COLOURS[MEASURES.index(name)],
                alpha=1.0 if without["fits"] else 0.35,
                label=f"without {name}",
            )
            if not without["fits"]:
                unfit = True
                axis.text(left, max(value, 0), "x", ha="center", va="bottom", fontsize=9)
    axis.set_xticks(
        range(len(cells)), [f"{m.removeprefix('paper_').upper()}\n{n}" for m, _, n in cells], fontsize=8
    )
    axis.axhline(0, color="#444444", lw=0.8)
    axis.set_ylabel("step longer, %")
    notes = ["simulated"]
    notes += [f"no {name} in any of them" for name in MEASURES if name not in names]
    notes += ["x and pale: does not fit in memory then"] * unfit
    _titled(axis, f"One measure switched off, H800, by model and GPUs ({'; '.join(notes)})", "")
    _legend(axis)
    return figure


def overlap(collection: Collection) -> Figure:
    """Hidden shares, and speed over the step without overlap, by variant."""
    figures = collection.need("overlap").figures
    names = {
        "no_overlap": "nothing\noverlaps",
        "overlap": "overlap,\nno recompute",
        "overlap_late_recompute": "recompute right\nbefore its use",
        "overlap_placed": "recompute\nplaced",
    }
    figure, (left, right) = _panels(2, width=10.0, height=3.4)
    for place, name in enumerate(names):
        hidden, recompute = figures["all_to_all_hidden"][name], figures["recompute_hidden"][name]
        left.bar(place - 0.2, 100 * hidden, width=0.38, color=COLOURS[0], label="all-to-all")
        left.text(place - 0.2, 100 * hidden, f"{100 * hidden:.0f}", ha="center", va="bottom", fontsize=8)
        if recompute is not None:
            left.bar(place + 0.2, 100 * recompute, width=0.38, color=COLOURS[1], label="recomputation")
            left.text(
                place + 0.2, 100 * recompute, f"{100 * recompute:.0f}", ha="center", va="bottom", fontsize=8
            )
        ratio = figures["speedup_over_no_overlap"][name]
        ends = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
        right.bar(place, ratio["median"], width=0.6, color=COLOURS[2])
        right.errorbar(place, ratio["median"], yerr=ends, color="#333333", capsize=3, lw=1)
    for axis in (left, right):
        axis.set_xticks(range(len(names)), list(names.values()), fontsize=8)
    left.set_ylim(0, 112)
    _titled(left, "Hidden, % of its time (emulated link)", "")
    coverage = figures["speedup_over_no_overlap"]["overlap_placed"]["coverage"]
    _titled(right, f"Times as fast as without overlap, and {100 * coverage:.0f} % interval", "")
    _legend(left)
    return figure


def traffic(collection: Collection) -> Figure:
    """Rows C per token and sublayer by phase, ours and others'."""
    figures = collection.need("traffic_1280").figures
    phases = ("forward", "backward", "recompute")
    rows: dict[str, Mapping[str, Any]] = {"this project, counted": figures}
    rows |= {name: of for name, of in figures["field"].items() if of["total"] is not None}
    figure, (axis,) = _panels(1, width=8.0, height=2.8)
    for place, of in enumerate(rows.values()):
        start = 0.0
        for colour, phase in zip(COLOURS, phases, strict=False):
            axis.barh(-place, of[phase], left=start, height=0.65, color=colour, label=phase)
            start += of[phase]
        axis.text(start + 1, -place, f"{of['total']:.0f}", va="center", fontsize=9)
    axis.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=9)
    axis.set_xlim(0, 1.08 * max(of["total"] for of in rows.values()))
    _titled(axis, "Rows of C read and written per token and sublayer, n = 4", "")
    _legend(axis)
    return figure


def scaling(collection: Collection) -> Figure:
    """Efficiency of both series; what lowering, placing and validating cost."""
    figures = collection.need("scaling").figures
    figure, (left, right) = _panels(2, width=10.0, height=3.6)
    for number, series in enumerate(dict.fromkeys(point["series"] for point in figures["points"])):
        points = [point for point in figures["points"] if point["series"] == series]
        sizes = [point["devices"] for point in points]
        left.plot(
            sizes, [100 * p["efficiency"] for p in points], "o-", color=COLOURS[number], ms=4, label=series
        )
        left.plot(
            sizes,
            [100 * p["bubble_ratio"] for p in points],
            "s--",
            color=COLOURS[number],
            ms=3,
            lw=1,
            label=f"{series}: bubble, % of the step",
        )
    left.set_ylim(0, 105)
    costs = figures["costs"]
    for number, part in enumerate(("lower", "place", "validate", "simulate")):
        right.plot(
            [cost["pipeline"] for cost in costs],
            [cost["seconds"][part] for cost in costs],
            "o-",
            color=COLOURS[number],
            ms=4,
            label=part,
        )
    right.set_yscale("log")
    right.set_xscale("log", base=2)
    right.set_xticks([cost["pipeline"] for cost in costs], [str(cost["pipeline"]) for cost in costs])
    left.set_xscale("log", base=2)
    left.set_xticks([8, 64, 512, 4096], ["8", "64", "512", "4096"])
    _titled(left, "Model FLOPs utilization, % of the series' smallest; simulated", "GPUs")
    _titled(right, "Seconds to make the program, deeper series; measured", "pipeline ranks")
    _legend(left)
    _legend(right)
    return figure


def _panels(number: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _titled(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis: Axes) -> None:
    """One entry a label, however many bars have it."""
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=8, framealpha=0.9)


DRAWINGS: dict[str, Draw] = {
    "overhead": overhead,
    "measures": measures,
    "overlap": overlap,
    "traffic": traffic,
    "scaling": scaling,
}
