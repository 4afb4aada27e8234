"""What the page and READMEs say in words, where a new measurement could make it untrue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mhc_dist.results.collection import Collection
from mhc_dist.results.source import load_source

ROOT = Path(__file__).parents[3]


def prose(name: str) -> str:
    """Text on one line, so that where it breaks does not matter."""
    return " ".join((ROOT / name).read_text().split())


def figures(name: str) -> Any:
    return Collection(ROOT / "results", load_source().results).need(name).figures


def says(words: str, file: str = "RESULTS.md") -> bool:
    return words in prose(file)


def test_what_the_page_says_of_losses_and_gradients() -> None:
    """Oracle: the study's table: of kinds with several seeds, who is lowest, whose norms are largest."""
    kinds = {name: of for name, of in figures("stability")["variants"].items() if of["seeds"] > 1}
    losses = {name: of["validation_loss"] for name, of in kinds.items()}
    norms = {name: of["largest_grad_norm"] for name, of in kinds.items()}
    assert says("the unbounded HC has the lowest loss here") == (min(losses, key=losses.__getitem__) == "hc")
    calm = norms["hc"] <= max(norm for name, norm in norms.items() if name != "hc")
    assert says("no larger spikes of its gradient norm than others") == calm
    ordered = losses["hc"] < losses["mhc"] < losses["residual"]
    study = "`hc` has the lowest loss here, `mhc` the next, the plain residual the highest of the three."
    assert says(study, "mhc_dist/study/README.md") == ordered
    difference = figures("stability")["claims"]["mhc_loss_not_above_residual"]["interval"]
    assert says("three seeds allow any difference inside the interval above") == (
        difference[0] < 0 < difference[1]
    )


def test_what_the_page_says_of_initialisations() -> None:
    """Oracle: the interval of the study's comparison, seed by seed."""
    low, high = figures("stability")["claims"]["identity_leaning_not_above_zero_bias"]["interval"]
    for file in ("RESULTS.md", "mhc_dist/study/README.md"):
        assert says("do not differ in loss beyond the noise of three seeds", file) == (low < 0 < high), file


def test_what_the_page_says_of_the_planned_overhead() -> None:
    """Oracle: the parts of the 27B plan, and the pipelines of its two layouts. The page gives a reason only
    where the claim falls short.
    """
    found = figures("plan_27b")
    parts = found["plan"]["overhead_breakdown"]
    own = {name: parts[name] for name in ("kernels", "recompute", "p2p")}
    if says("part that is mHC's own are its kernels"):
        assert max(own, key=own.__getitem__) == "kernels"
    if says("is fastest with a deeper pipeline"):
        (depth,) = re.findall(r"pipeline=(\d+)", found["plain"]["layout"])
        assert int(depth) > found["plan"]["pipeline"]


def test_what_the_page_says_of_scaling() -> None:
    """Oracle: bubble and exposed communication of the wider series, where only data ranks grow."""
    assert says("exposed communication and bubble of the simulated step are the same from 64 to 4096 GPUs")
    points = [point for point in figures("scaling")["points"] if point["series"] == "wider"]
    assert (points[0]["devices"], points[-1]["devices"]) == (64, 4096)
    for names in (("bubble_ratio",), ("exposed_all_to_all_ratio", "exposed_p2p_ratio")):
        shares = [sum(point[name] for name in names) for point in points]
        assert max(shares) - min(shares) < 0.01, names
