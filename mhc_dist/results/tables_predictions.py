"""What the simulator says of memory and time beside what ranks counted and took."""

from __future__ import annotations

from mhc_dist.results.collection import Collection
from mhc_dist.results.shown import shown, table
from mhc_dist.results.sourced import with_source


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
