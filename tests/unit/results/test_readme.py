"""The figures that READMEs repeat from results/, where a page is not written by `make results`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def figures(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "results" / name).read_text())
    found: dict[str, Any] = content.get("figures", content)
    return found


def overlap_rows() -> list[str]:
    found = figures("overlap_0.6.json")
    names = ("all_to_all_hidden_ratio", "all_to_all_hidden_ratio_without_late_peers")
    combines = ("forward_combine_hidden_ratio", "backward_combine_hidden_ratio")
    hidden, combined = ([f"{100 * found[name]:.0f} %" for name in keys] for keys in (names, combines))
    late = found["recompute_hidden"]["overlap_late_recompute"]
    faster = [found["speedup_over_no_overlap"][name]["median"] for name in ("overlap_placed", "overlap")]
    return [
        f"| {', '.join(hidden)}; {', '.join(combined)} |",
        f"(right before its use: {100 * late:.0f} %) | {100 * found['recompute_hidden_ratio']:.0f} % |",
        f"| {faster[0]:.2f}, {faster[1]:.2f} times as fast |",
    ]


def peers_rows() -> list[str]:
    ratios = figures("peers_real.json")["speedups"]
    peers = ("deepspeed_dualpipev", "torch_dualpipev")
    ours = ("ours_recompute_mhc", "ours_recompute_none")
    with_recompute, without = (
        ", ".join(f"{ratios[one][peer]['median']:.2f}" for peer in peers) for one in ours
    )
    return [f"| {with_recompute} ({without}) |"]


def memory_rows() -> list[str]:
    found = figures("memory.json")
    return [f"| {found['saved_bytes_ratio']:.4f}; {100 * found['peak_error_ratio']:.1f} % |"]


def overhead_rows() -> list[str]:
    found = figures("overhead_1280.json")
    low, high = (100 * edge for edge in found["overhead_interval"])
    return [f"| {100 * found['overhead_ratio']:+.1f} % ({low:+.1f} to {high:+.1f}) |"]


@pytest.mark.parametrize("rows", [overlap_rows, peers_rows, memory_rows, overhead_rows])
def test_the_readme_repeats_what_was_measured(rows: Callable[[], list[str]]) -> None:
    """Oracle: the result files, which name the command that wrote them."""
    text = (ROOT / "README.md").read_text()
    for row in rows():
        assert row in text, f"README.md lacks {row!r}: its table is older than results/"


@pytest.mark.parametrize("backend", ["cpu", "compiled"])
def test_the_kernels_readme_repeats_what_was_measured(backend: str) -> None:
    """Oracle: the result file of the C = 1280 column."""
    found = figures("kernels/cpu_1280.json")["backends"][backend]
    row = f"| `{backend}` | {found['total_ms']:.0f} ms | **{found['ratio_to_reference']:.2f}** |"
    assert row in (ROOT / "kernels" / "README.md").read_text(), row
