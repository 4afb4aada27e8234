"""Tables of the page by name: Markdown from result files, each with its provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhc_dist.results.collection import Collection
from mhc_dist.results.limits import limits_table
from mhc_dist.results.shown import provenance, shown, table
from mhc_dist.results.tables_plans import PLAN_TABLES

Table = Callable[[Collection], str]


def with_source(collection: Collection, text: str, *names: str) -> str:
    """`text` and where its figures come from."""
    lines = [
        provenance(file, f"results/{file.path.relative_to(collection.folder)}")
        for name in names
        if (file := collection.get(name)) is not None
    ]
    return "\n\n".join([text, "<br>\n".join(lines)])


def overhead_measured(collection: Collection) -> str:
    """One column a width, one row a part of the step."""
    names = ("overhead_256", "overhead_512", "overhead_1280")
    files = {name: file for name in names if (file := collection.get(name)) is not None}
    if not files:
        collection.need(names[-1])
    figures = [file.figures for file in files.values()]

    def row(title: str, value: Callable[[Any], str]) -> list[str]:
        return [title, *(value(of) for of in figures)]

    rows = [
        row("overhead", lambda of: f"**{shown(of['overhead_ratio'], '+%')}**"),
        row("95 % interval", lambda of: " to ".join(shown(end, "+%") for end in of["overhead_interval"])),
        *(
            row(f"of it {part}", lambda of, part=part: shown(of["breakdown"].get(part, 0.0), "+%"))  # type: ignore[misc]
            for part in ("forward", "backward", "recompute", "weight_grad")
        ),
    ]
    text = table(["measured, share of the plain step", *(f"C = {of['hidden_size']}" for of in figures)], rows)
    lines = [text, *(f"\n*{name}: {collection.missing(name)}.*" for name in names if name not in files)]
    return with_source(collection, "\n".join(lines), *files)


def overlap_variants(collection: Collection) -> str:
    """One row a way to run the same step, on two ranks and on four."""
    parts = [_overlap(collection, "overlap")]
    if collection.get("overlap_4") is not None:
        parts.append("Two pipeline ranks and two data ranks:")
    return "\n\n".join([*parts, _overlap(collection, "overlap_4")])


def _overlap(collection: Collection, name_of_file: str) -> str:
    if name_of_file != "overlap" and collection.get(name_of_file) is None:
        return f"*Four ranks: {collection.missing(name_of_file)}.*"
    figures = collection.need(name_of_file).figures
    titles = {
        "no_overlap": "nothing overlaps",
        "overlap": "overlap, nothing recomputed",
        "overlap_late_recompute": "overlap, recomputation right before its use",
        "overlap_placed": "overlap, recomputation placed",
    }
    rows = []
    for name, title in titles.items():
        ratio = figures["speedup_over_no_overlap"][name]
        rows.append(
            [
                title,
                shown(figures["step_seconds"][name], "s"),
                shown(ratio["median"], "x") + f" ({ratio['low']:.2f} to {ratio['high']:.2f})",
                shown(figures["all_to_all_hidden"][name], "%"),
                shown(figures["recompute_hidden"][name], "%"),
                shown(figures["simulator"][name]["ratio"], ".2f"),
            ]
        )
    headings = [
        "variant",
        "step",
        "as fast as the first",
        "all-to-all hidden",
        "recompute hidden",
        "simulated / run",
    ]
    return with_source(collection, table(headings, rows), name_of_file)


def peers(collection: Collection) -> str:
    """One row an engine, for every way to compare that was measured."""
    parts = []
    for name in ("peers", "peers_nominal", "peers_veth"):
        file = collection.get(name)
        if file is None:
            parts.append(f"*{name}: {collection.missing(name)}.*")
            continue
        ours = file.figures["speedups"]
        rows = [
            [engine, *(_interval(ours[variant][engine]) for variant in ours)]
            for engine in next(iter(ours.values()))
        ]
        headings = ["their step over ours", *(variant.replace("_", " ") for variant in ours)]
        parts.append(with_source(collection, table(headings, rows), name))
    if all(collection.get(name) is None for name in ("peers", "peers_nominal", "peers_veth")):
        collection.need("peers")
    return "\n\n".join(parts)


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def memory(collection: Collection) -> str:
    """Peaks of every schedule in every mode, as the ratio simulated / counted."""
    peaks = collection.need("memory").figures["peaks"]
    modes = list(dict.fromkeys(peak["recompute"] for peak in peaks))
    of = {(peak["schedule"], peak["recompute"]): peak for peak in peaks}
    rows = [
        [name, *(f"{shown(of[name, m]['counted_bytes'], 'MB')} ({of[name, m]['ratio']:.3f})" for m in modes)]
        for name in dict.fromkeys(peak["schedule"] for peak in peaks)
    ]
    headings = ["peak of a step (simulated / counted)", *(f"recompute {mode}" for mode in modes)]
    return with_source(collection, table(headings, rows), "memory")


def simulator(collection: Collection) -> str:
    """Predicted over measured, one row a schedule, one column a recompute mode."""
    parts = []
    for ranks in (2, 4, 8):
        file = collection.get(f"simulator_{ranks}")
        if file is None:
            continue
        cases = file.figures["cases"]
        modes = list(dict.fromkeys(case["recompute"] for case in cases))
        of = {(case["schedule"], case["recompute"]): case["ratio"] for case in cases}
        rows = [
            [name, *(f"{of[name, mode]:.3f}" for mode in modes)]
            for name in dict.fromkeys(case["schedule"] for case in cases)
        ]
        headings = [f"predicted / run, {ranks} ranks", *(f"recompute {mode}" for mode in modes)]
        parts.append(with_source(collection, table(headings, rows), f"simulator_{ranks}"))
    if not parts:
        collection.need("simulator_2")
    return "\n\n".join(parts)


def traffic(collection: Collection) -> str:
    """Ours at two widths beside what others move, in rows C per token and sublayer."""
    phases = ("forward", "backward", "recompute", "total")
    ours, wide = collection.need("traffic_1280").figures, collection.need("traffic_2560").figures
    rows = [
        [f"**counted, C = {of['channels']}**", *(f"**{of[phase]:.1f}**" for phase in phases)]
        for of in (ours, wide)
    ]
    rows.append(
        ["of it streams", *(f"{ours['phases'][p]['streams']:g}" for p in phases[:3]), f"{ours['streams']:g}"]
    )
    rows += [
        [f"{name} (read from source)", *("" if of[p] is None else f"{of[p]:g}" for p in phases)]
        for name, of in ours["field"].items()
    ]
    return with_source(collection, table(["rows C", *phases], rows), "traffic_1280", "traffic_2560")


def processor(collection: Collection) -> str:
    """Backends of one connection, and token work of experts, on this machine's processor."""
    rows = []
    for name in ("cpu_1280", "cpu_512"):
        figures = collection.need(name).figures
        rows += [
            [
                f"connection, C = {figures['channels']}, `{backend}`",
                *(f"{of[part]:.0f} ms" for part in ("forward_ms", "backward_ms", "total_ms")),
                f"{of['ratio_to_reference']:.2f}",
            ]
            for backend, of in figures["backends"].items()
        ]
    headings = ["", "forward", "backward", "both", "of the naive form"]
    parts = [with_source(collection, table(headings, rows), "cpu_1280", "cpu_512")]
    tokens = collection.need("tokens").figures["median_ms"]
    rows = [[name, f"{value:.1f} ms"] for name, value in tokens.items()]
    return "\n\n".join([*parts, with_source(collection, table(["token work", ""], rows), "tokens")])


def resources(collection: Collection) -> str:
    """What the compilers made of the kernels, one row an architecture."""
    names = ("resources_sm_90", "resources_sm_100", "resources_gfx942")
    rows = []
    for name in names:
        figures = collection.need(name).figures
        kernels = figures["kernels"]
        rows.append(
            [
                figures["architecture"],
                str(len(kernels)),
                str(sum(kernel["spills"] > 0 for kernel in kernels)),
                str(sum(kernel["atomics"] > 0 for kernel in kernels)),
                str(max(kernel["registers"] for kernel in kernels)),
                f"{8 * min(kernel['vector_bytes'] for kernel in kernels)} bit",
            ]
        )
    headings = [
        "architecture",
        "compiled",
        "with spills",
        "with atomics",
        "most registers",
        "narrowest stream access",
    ]
    return with_source(collection, table(headings, rows), *names)


def stability(collection: Collection) -> str:
    """One row a residual kind."""
    variants = collection.need("stability").figures["variants"]
    rows = []
    for name, of in variants.items():
        deviation = of["validation_loss_deviation"]
        rows.append(
            [
                name,
                str(of["seeds"]),
                f"{of['validation_loss']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}"),
                shown(of["largest_forward_gain"], ".3g"),
                shown(of["largest_backward_gain"], ".3g"),
                shown(of["largest_single_forward_gain"], ".3g"),
                shown(of["largest_grad_norm"], ".3g"),
            ]
        )
    headings = [
        "kind",
        "seeds",
        "validation loss",
        "largest gain, forward",
        "backward",
        "of one layer",
        "largest gradient norm",
    ]
    return with_source(collection, table(headings, rows), "stability")


def sinkhorn(collection: Collection) -> str:
    """After 20 iterations, the paper's number, every case; and the exact mixes."""
    figures = collection.need("sinkhorn").figures
    rows = []
    for name, case in figures["cases"].items():
        at = case["iterations"].index(20)
        rows.append(
            [
                name,
                *(f"{case[key][at]:.2g}" for key in ("column_residual", "row_residual")),
                f"{case['gain'][at]:.6f}",
            ]
        )
    rows += [
        [
            f"exact: {name}",
            *(f"{of[key]:.2g}" for key in ("column_residual", "row_residual")),
            f"{of['gain']:.6f}",
        ]
        for name, of in figures["exact"].items()
    ]
    headings = ["20 iterations", "columns from 1, at most", "rows from 1, at most", "composite gain"]
    return with_source(collection, table(headings, rows), "sinkhorn")


def scaling_steps(collection: Collection) -> str:
    """Simulated steps of both ways to grow."""
    figures = collection.need("scaling").figures
    rows = [
        [
            point["series"],
            shown(point["devices"], "int"),
            f"{point['pipeline']} x {point['data']}",
            str(point["num_layers"]),
            shown(point["step_seconds"], ".4g"),
            shown(point["efficiency"], "%"),
            shown(point["bubble_ratio"], "%"),
            shown(point["exposed_all_to_all_ratio"] + point["exposed_p2p_ratio"], "%"),
            shown(point["reduce_seconds"] / point["step_seconds"], "%"),
            shown(point["overhead_ratio_same_layout"], "+%"),
            shown(point["peak_memory_bytes"], "GB") + ("" if point["fits"] else ", too much"),
        ]
        for point in figures["points"]
    ]
    headings = [
        "",
        "GPUs",
        "pipeline x data",
        "layers",
        "step s",
        "efficiency",
        "bubble",
        "exposed",
        "reduction",
        "overhead",
        "memory",
    ]
    return with_source(collection, table(headings, rows), "scaling")


def scaling_costs(collection: Collection) -> str:
    """What making those programs costs, in a fresh process each."""
    figures = collection.need("scaling").figures
    rows = [
        [
            shown(cost["devices"], "int"),
            f"{cost['pipeline']} x {cost['num_microbatches']}",
            shown(cost["actions"], "int"),
            *(
                shown(cost["seconds"][part], ".3g")
                for part in ("lower", "validate", "simulate", "place", "place_with_collector")
            ),
            shown(cost["lowered_bytes"], "MB"),
            shown(cost["peak_bytes"], "MB"),
        ]
        for cost in figures["costs"]
    ]
    headings = [
        "GPUs",
        "pipeline x microbatches",
        "actions",
        "lower s",
        "validate s",
        "simulate s",
        "place s",
        "with collector",
        "memory, lowered",
        "placed",
    ]
    return with_source(collection, table(headings, rows), "scaling")


def scaling_limits(collection: Collection) -> str:
    """What grows on the way to ten times as many ranks."""
    return with_source(collection, limits_table(collection.need("scaling").figures), "scaling")


TABLES: dict[str, Table] = {
    **PLAN_TABLES,
    "overhead_measured": overhead_measured,
    "overlap_variants": overlap_variants,
    "peers": peers,
    "memory": memory,
    "simulator": simulator,
    "traffic": traffic,
    "resources": resources,
    "processor": processor,
    "stability": stability,
    "sinkhorn": sinkhorn,
    "scaling_steps": scaling_steps,
    "scaling_costs": scaling_costs,
    "scaling_limits": scaling_limits,
}
