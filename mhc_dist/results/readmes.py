"""What READMEs repeat from results/, piece by piece: the words around the figures, and the figures.

Everything that a README says and a result file holds belongs here. What only code holds (limits, constants)
does not, nor what was tried once and is told as history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mhc_dist.results.collection import Collection, NotMeasuredError
from mhc_dist.results.readmes_kernels import KERNEL_SUBJECTS
from mhc_dist.results.repeated import Repeated

TOP = "README.md"
STUDY = "mhc_dist/study/README.md"

Pieces = Iterator[Repeated]


def pieces(collection: Collection) -> tuple[list[Repeated], list[str]]:
    """All of them; and why some are left out: their files are not there."""
    found: list[Repeated] = []
    missing: list[str] = []
    for subject in SUBJECTS:
        try:
            found += subject(collection)
        except NotMeasuredError as error:
            missing.append(str(error))
    return found, missing


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def overlap(collection: Collection) -> Pieces:
    of = collection.need("overlap").figures
    hidden = [
        *(of[f"all_to_all_hidden_ratio{how}"] for how in ("", "_without_late_peers")),
        *(of[f"{way}_combine_hidden_ratio"] for way in ("forward", "backward")),
    ]
    ratio = f"{of['all_to_all_to_compute_ratio']:g}"
    yield Repeated(
        TOP,
        "| {} %, {} %; {} %, {} % | emulated link, exchanges {} of compute"
        " | `mhc-dist bench overlap --rounds {}` |",
        (*map(percent, hidden), ratio, str(of["rounds"])),
    )
    late = of["recompute_hidden"]["overlap_late_recompute"]
    yield Repeated(
        TOP,
        "(right before its use: {} %) | {} % |",
        (percent(late), percent(of["recompute_hidden_ratio"])),
    )
    faster = [of["speedup_over_no_overlap"][name]["median"] for name in ("overlap_placed", "overlap")]
    yield Repeated(TOP, "| {}, {} times as fast |", tuple(f"{one:.2f}" for one in faster))


def peers(collection: Collection) -> Pieces:
    of = collection.need("peers").figures
    faster = [
        of["speedups"][ours][peer]["median"]
        for ours in ("ours_recompute_mhc", "ours_recompute_none")
        for peer in ("deepspeed_dualpipev", "torch_dualpipev")
    ]
    yield Repeated(
        TOP,
        "| {}, {} ({}, {}) | emulated link, exchanges as long as compute"
        " | `mhc-dist bench peers --rounds {}` |",
        (*(f"{one:.2f}" for one in faster), str(of["rounds"])),
    )


def memory(collection: Collection) -> Pieces:
    of = collection.need("memory").figures
    yield Repeated(
        TOP,
        "| {}; {} % | measured, allocator |",
        (f"{of['saved_bytes_ratio']:.4f}", percent(of["peak_error_ratio"], 1)),
    )


def overhead(collection: Collection) -> Pieces:
    of = collection.need("overhead_1280").figures
    yield Repeated(
        TOP,
        "| {} % ({} to {}) | measured, one thread | `mhc-dist bench overhead --rounds {}` |",
        (signed(of["overhead_ratio"]), *map(signed, of["overhead_interval"]), str(of["rounds"])),
    )


def planned(collection: Collection) -> Pieces:
    plan = collection.need("plan_27b").figures["plan"]
    same, best = signed(plan["overhead_ratio_same_layout"]), signed(plan["overhead_ratio"])
    yield Repeated(TOP, "| {} %, {} % (published: +6.7 %) |", (same, best))
    yield Repeated("mhc_dist/plan/README.md", "27B on 512 H800 in the same layout is {} % now.", (same,))


def stability(collection: Collection) -> Pieces:
    of = collection.need("stability").figures
    claims, kinds = of["claims"], of["variants"]
    layers, steps = str(of["layers"]), str(of["steps"])
    least = claims["hc_gain_above_10_times_mhc"]["ratio"]
    largest = claims["mhc_gain_at_most_2"]["largest_gain"]
    yield Repeated(
        TOP,
        "| composite gain of HC, {} layers, {} steps, smallest seed; of mHC, largest"
        " | {} times mHC's; {} | measured |",
        (layers, steps, f"{least:,.0f}", f"{largest:.3f}"),
    )
    last = [*kinds["hc"]["last_forward_gain"], *kinds["hc"]["last_backward_gain"]]
    single = max(kinds["hc"][f"largest_single_{way}_gain"] for way in ("forward", "backward"))
    yield Repeated(
        STUDY,
        "at the end of {} steps it is {} to {} in {} layers, over seeds and directions;"
        " a single sublayer's reaches {}.",
        (steps, f"{min(last):,.0f}", f"{max(last):,.0f}", layers, f"{single:.1f}"),
    )
    beyond = percent(kinds["mhc"]["largest_backward_gain"] - 1.0, 1)
    yield Repeated(STUDY, "backward within {} %, which is what twenty iterations", (beyond,))
    yield Repeated(STUDY, "and costs {} % of gain.", (beyond,))
    by_seed = claims["mhc_loss_not_above_residual"]["by_seed"]
    yield Repeated(
        STUDY,
        "`mhc` ends below the plain residual with {} of {} seeds",
        (str(sum(one < 0 for one in by_seed)), str(len(by_seed))),
    )


def sinkhorn(collection: Collection) -> Pieces:
    cases = collection.need("sinkhorn").figures["cases"]

    def at_20(name: str, key: str) -> float:
        case = cases[name]
        value: float = case[key][case["iterations"].index(20)]
        return value

    for width, gain_digits in ((1, 6), (3, 3), (6, 2)):
        plain, bf16 = f"width {width}, fp32, paper", f"width {width}, bf16, paper"
        yield Repeated(
            STUDY,
            f"| {width} | {{}} | {{}} | {{}} | {{}} |",
            (
                short(at_20(plain, "column_residual")),
                f"{at_20(plain, 'gain'):.{gain_digits}f}",
                short(at_20(f"width {width}, fp32, deepseek_v4", "difference")),
                f"{at_20(bf16, 'difference'):.3f}",
            ),
        )


def short(value: float) -> str:
    """Two digits; small ones as 5.5e-4."""
    if abs(value) >= 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def simulator(collection: Collection) -> Pieces:
    overruns = []
    for name in ("simulator_4", "simulator_8"):
        shares = [case["overrun_share"] for case in collection.need(name).figures["cases"]]
        overruns += [percent(min(shares), 1), percent(max(shares), 1)]
    yield Repeated(
        "mhc_dist/bench/README.md",
        "phases overran by {} to {} % with four ranks and by {} to {} % with eight.",
        tuple(overruns),
    )


SUBJECTS: tuple[Callable[[Collection], Pieces], ...] = (
    overlap,
    peers,
    memory,
    overhead,
    planned,
    stability,
    sinkhorn,
    simulator,
    *KERNEL_SUBJECTS,
)
