"""What the kernels move, what compilers made of them, and their time on a processor."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import table
from mhc_dist.results.sourced import with_source

CHUNKED = ("traffic_chunked", "traffic_chunked_256", "traffic_chunked_shifted")
"""A width of 256 shows what the carried H_pre of `shifted_pre` costs: coefficients weigh most there."""


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
    chunked = [name for name in CHUNKED if collection.get(name) is not None]
    for name in chunked:
        of = collection.need(name).figures
        title = f"launched in chunks, behind a modelled cache, C = {of['channels']}"
        title += ", `shifted_pre`: one pass" if of["shifted_pre"] else ""
        rows.append([title, *(f"{of[phase]:.1f}" for phase in phases)])
    rows += [
        [f"{name} (read from source)", *("" if of[p] is None else f"{of[p]:g}" for p in phases)]
        for name, of in ours["field"].items()
    ]
    return with_source(collection, table(["rows C", *phases], rows), "traffic_1280", "traffic_2560", *chunked)


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
    """What the compilers made of the kernels, one row an architecture and number of streams."""
    architectures = ("sm_90", "sm_100", "gfx942")
    names = [f"resources_{name}" for name in architectures]
    names += [name for a in architectures if collection.get(name := f"resources_{a}_n8") is not None]
    rows = []
    for name in names:
        figures = collection.need(name).figures
        kernels = figures["kernels"]
        rows.append(
            [
                f"{figures['architecture']}, n = {figures['streams']}",
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
