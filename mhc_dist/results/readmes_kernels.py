"""What READMEs repeat of the kernels: bytes, what compilers made of them, times on a processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mhc_dist.results.collection import Collection
from mhc_dist.results.repeated import Repeated

KERNELS = "kernels/README.md"
PHASES = ("forward", "backward", "recompute", "total")
NVIDIA = ("sm_90", "sm_100")
CHANNELS = 1280
"""Of the README's table of resources."""

RESOURCE_ROWS: dict[str, tuple[str, ...]] = {
    "post_project": ("post_project",),
    "mix_pre": ("mix_pre",),
    "backward_dots": ("backward_dots",),
    "backward_apply": ("backward_apply",),
    "project_backward": ("project_backward",),
    "recompute_block (L = 3)": ("recompute_block",),
    "in chunks: backward_dots": ("backward_dots_chunked",),
    "in chunks: backward_apply": ("backward_apply_chunked",),
    "in chunks: project_backward": ("project_backward_chunked",),
}
"""First cell of a row, and the kernels it is about."""

SUMS = ("project", "post", "pre", "post_backward", "pre_backward", "reduce_partials", "reduce_rows")
TOKENS = ("unpermute", "unpermute_backward", "swiglu", "swiglu_backward")

Pieces = Iterator[Repeated]


def traffic(collection: Collection) -> Pieces:
    def counted(name: str) -> tuple[str, ...]:
        return tuple(f"{collection.figure(name, phase):.2f}" for phase in PHASES)

    yield Repeated("README.md", "| {} C | counted |", (f"{collection.figure('traffic_1280', 'total'):.1f}",))
    yield Repeated(
        KERNELS,
        "| **counted, C = 1280** (`results/kernels/traffic_1280.json`) | {} | {} | {} | **{}** |",
        counted("traffic_1280"),
    )
    yield Repeated(
        KERNELS, "| counted, C = 2560 (`traffic_2560.json`) | {} | {} | {} | {} |", counted("traffic_2560")
    )
    yield Repeated(
        KERNELS,
        "| counted in chunks behind a modelled cache, C = 1280 (`traffic_chunked_1280.json`)"
        " | {} | {} | {} | {} |",
        counted("traffic_chunked"),
    )
    yield Repeated(KERNELS, "**{} + {} + {} = {}** at C = 1280", counted("traffic_chunked"))
    yield Repeated(KERNELS, "and {} + {} + {} = {} at 256", counted("traffic_chunked_256"))
    yield Repeated(
        KERNELS,
        "`--chunked --shifted-pre --channels 256` counts {} + {} + {} = {}",
        counted("traffic_chunked_shifted"),
    )


def resources(collection: Collection) -> Pieces:
    compiled = {name: _kernels(collection, f"resources_{name}") for name in NVIDIA}
    for title, names in RESOURCE_ROWS.items():
        here = {name: [_one(kernels, kernel) for kernel in names] for name, kernels in compiled.items()}
        cells = [
            cell
            for kernels in here.values()
            for cell in (str(_most(kernels, "registers")), _kib(_most(kernels, "shared_bytes")))
        ]
        yield Repeated(
            KERNELS,
            f"| {title} | {{}} / {{}} | {{}} / {{}} | {{}} | {{}} | {{}} bit |",
            (*cells, *_clean([kernel for kernels in here.values() for kernel in kernels])),
        )
    for title, kinds, memory in (
        ("project, post, pre, backwards of post and pre, sums", SUMS, ""),
        ("tokens: unpermute, swiglu, their backwards", TOKENS, " / 0"),
    ):
        groups = [[_one(kernels, kernel) for kernel in kinds] for kernels in compiled.values()]
        yield Repeated(
            KERNELS,
            f"| {title} | at most {{}}{memory} | at most {{}}{memory} | {{}} | {{}} | {{}} bit |",
            (
                *(str(_most(group, "registers")) for group in groups),
                *_clean([kernel for group in groups for kernel in group]),
            ),
        )
    yield Repeated(
        KERNELS,
        "All {} compilations per NVIDIA architecture are free of spills and of global atomics",
        (str(len(compiled["sm_90"])),),
    )
    yield Repeated(
        KERNELS, "and so are the {} for gfx942", (str(len(_kernels(collection, "resources_gfx942"))),)
    )


def wide_resources(collection: Collection) -> Pieces:
    """n = 8."""
    compiled = [_kernels(collection, f"resources_{name}_n8") for name in NVIDIA]
    for kernel, words in (
        ("post_project", "{} registers on sm_90 and {} on sm_100, without loads that run ahead"),
        ("backward_streams", "it takes {} registers on sm_90 and {} on sm_100."),
    ):
        registers = (str(_one(kernels, kernel)["registers"]) for kernels in compiled)
        yield Repeated(KERNELS, words, tuple(registers))


def processor(collection: Collection) -> Pieces:
    wide, narrow = (collection.need(name).figures for name in ("cpu_1280", "cpu_512"))

    def cell(of: Mapping[str, Any], backend: str) -> tuple[str, str]:
        found = of["backends"][backend]
        return f"{found['total_ms']:.0f}", f"{found['ratio_to_reference']:.2f}"

    naive = cell(wide, "reference")[0], cell(narrow, "reference")[0]
    yield Repeated(KERNELS, "| reference (naive eager) | {} ms | 1 | {} ms | 1 |", naive)
    yield Repeated(
        KERNELS, "| `cpu` | {} ms | **{}** | {} ms | **{}** |", (*cell(wide, "cpu"), *cell(narrow, "cpu"))
    )
    yield Repeated(KERNELS, "| `compiled` | {} ms | **{}** | not in this run | |", cell(wide, "compiled"))
    yield Repeated(
        KERNELS, "medians over {} rounds ({} at C = 512)", (str(wide["rounds"]), str(narrow["rounds"]))
    )
    bound = wide["bound"]
    parts = [bound[f"{name}_ms"] for name in ("matrix_products", "fresh_memory", "bytes")]
    total = wide["backends"]["cpu"]["total_ms"]
    yield Repeated(
        KERNELS,
        "the three skinny products with phi {} ms, page faults of the fresh x' and dx {} ms,"
        " the 34 C of bytes at copy bandwidth {} ms; together {} of {} ms."
        " So the byte bound is {} times away",
        tuple(f"{one:.0f}" for one in (*parts, sum(parts), total, total / parts[-1])),
    )


def tokens(collection: Collection) -> Pieces:
    median = collection.need("tokens").figures["median_ms"]
    for words, names in (
        ("| permute | index_select {} | backward that gathers {} |", ("permute torch", "permute gathered")),
        ("| unpermute, weighted | index_add {} | {} |", ("unpermute torch", "unpermute ours")),
        ("| SwiGLU | silu * up {} |", ("swiglu torch",)),
    ):
        yield Repeated(KERNELS, words, tuple(f"{median[name]:.1f}" for name in names))
    yield Repeated(
        KERNELS,
        "| grouped product | loop over experts {}, `grouped_mm` {} |",
        tuple(f"{median[name]:.0f}" for name in ("grouped loop", "grouped torch")),
    )


def _kernels(collection: Collection, name: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = collection.need(name).figures["kernels"]
    return found


def _one(kernels: list[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The kernel at the README's width. ValueError if the file has no such kernel, or several."""
    found = [kernel for kernel in kernels if (kernel["name"], kernel["channels"]) == (name, CHANNELS)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels {name!r} with C = {CHANNELS} in a file of resources, not 1")
    return found[0]


def _most(kernels: list[Mapping[str, Any]], key: str) -> int:
    return max(int(kernel[key]) for kernel in kernels)


def _kib(size: int) -> str:
    return f"{size / 1024:.0f}" if size >= 1024 or size == 0 else f"{size / 1024:g}"


def _clean(kernels: list[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Spills, atomics, bits of the narrowest access to streams."""
    spills, atomics = (str(sum(kernel[key] for kernel in kernels)) for key in ("spills", "atomics"))
    return spills, atomics, str(8 * min(kernel["vector_bytes"] for kernel in kernels))


KERNEL_SUBJECTS: tuple[Callable[[Collection], Pieces], ...] = (
    traffic,
    resources,
    wide_resources,
    processor,
    tokens,
)
