"""A plan as text and as JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mhc_dist.config import RunConfig
from mhc_dist.plan.evaluate import Evaluation
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.overhead import Overhead
from mhc_dist.plan.search import Search

HEADINGS = (
    "schedule",
    "pipe",
    "data",
    "expert",
    "micro",
    "x seq",
    "recompute",
    "step s",
    "tokens/s",
    "MFU",
    "bubble",
    "exposed a2a",
    "exposed p2p",
    "GB/GPU",
)

ASSUMPTIONS = (
    "routing is balanced: every expert gets the same number of rows",
    "each row travels to every expert it is meant for, also to two on one rank",
    "an exchange or a transfer keeps its lane to itself; node and network lanes are independent",
    "element-wise steps are fused: each reads its inputs and writes its outputs once, forward and back; the"
    " loss and the embedding's gradient move what torch's operations move",
    "connections use seam-fused kernels and move what is counted of them: 3n+2 rows of streams forward, 4n+4"
    " backward, n+2 recomputed (3n+2 by a phase's first), per token and sublayer, and coefficients and"
    " partial sums beside them; hc and krom, and backends compiled and reference, have no kernels and move"
    " 8n+4 forward, twice that backward, and multiply in fp32",
    "products with connections' weights take the matrix units' time in tf32, beside the bytes; what else"
    " makes coefficients is done while bytes move",
    "the plain residual adds and normalises in one pass: 4 rows forward, 4 backward",
    "the first chunk writes all streams once, the last one makes one of them operation by operation, in fp32",
    "matrices take as long as their operations, at one efficiency for all shapes, and then as long as reading"
    " and writing does: tokens, weights, fp32 sums of gradients; routers multiply in fp32",
    "attention works at one width for queries, keys and values, the widest, and moves what is filled up",
    "a message between pipeline ranks takes what the slowest of their links does: that of the network, if the"
    " run spans nodes",
    "gradients are reduced and weights gathered after the last weight gradient, not under it; between nodes"
    " every member of a group has a network port of its own",
    "the optimizer's own arithmetic, kernel launches and data loading are not counted",
)


def table(evaluations: Sequence[Evaluation]) -> str:
    """One line per layout, fastest first."""
    rows = [HEADINGS, *(_row(evaluation) for evaluation in evaluations)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _row(evaluation: Evaluation) -> tuple[str, ...]:
    layout, summary = evaluation.layout, evaluation.summary
    return (
        layout.schedule,
        str(layout.pipeline),
        str(layout.data),
        str(layout.expert),
        str(layout.num_microbatches),
        "" if layout.sequences is None else str(layout.sequences),
        layout.recompute_text,
        f"{evaluation.step_seconds:.4g}",
        f"{evaluation.tokens_per_second:.4g}",
        f"{evaluation.model_flops_utilization:.1%}",
        f"{summary.bubble_ratio:.1%}",
        f"{summary.exposed_all_to_all_ratio:.1%}",
        f"{summary.exposed_p2p_ratio:.1%}",
        f"{evaluation.peak_bytes / 1e9:.1f}",
    )


def settings_text(config: RunConfig, best: Evaluation) -> str:
    """How to run the best layout, chunk boundaries included."""
    return "to run the first: " + " ".join(f"--set {setting}" for setting in best.layout.settings(config))


def memory_text(best: Evaluation) -> str:
    """Where the memory of the fullest rank goes in the best layout."""
    held = best.fullest
    activations = best.peak_bytes - held.total
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations at the peak": activations,
    }
    return "fullest rank: " + ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts.items())


def overhead_text(config: RunConfig, overhead: Overhead) -> str:
    """The overhead and its parts, the largest named."""
    kind = config.residual.kind.value
    lines = [
        f"{kind} with {config.residual.num_streams} streams against the plain residual at its best"
        f" ({overhead.plain.layout}): {overhead.ratio:+.2%}"
    ]
    lines += [f"  {name:<14}{part:+.2%}" for name, part in overhead.breakdown.items()]
    lines.append(
        f"  the largest part is {overhead.dominant}; against the plain residual in the same layout, as"
        f" published figures compare: {overhead.ratio_in_same_layout:+.2%}"
    )
    return "\n".join(lines)


def plan_text(
    config: RunConfig, machine: Machine, num_devices: int, found: Search, overhead: Overhead, rows: int
) -> str:
    """The whole plan, every assumption included."""
    cluster = machine.cluster
    device = cluster.device
    parts = [
        f"{num_devices} x {device.name} on {cluster.name}: {found.num_layouts} layouts possible,"
        f" {found.num_fitting} may fit {machine.memory_budget / 1e9:.1f} GB, {len(found.best)} simulated",
        table(found.best[:rows]),
        memory_text(found.best[0]),
        settings_text(config, found.best[0]),
        overhead_text(config, overhead),
        "assumptions:\n" + "\n".join(f"  {line}" for line in ASSUMPTIONS),
        "constants:\n" + "\n".join(f"  {name} = {c.value:g}: {c.source}" for name, c in cluster.constants()),
    ]
    return "\n\n".join(parts)


def plan_json(config: RunConfig, found: Search, overhead: Overhead) -> dict[str, object]:
    """The best layout under the names others rely on."""
    best = found.best[0]
    layout, summary = best.layout, best.summary
    return {
        "schedule": layout.schedule,
        "pipeline": layout.pipeline,
        "expert": layout.expert,
        "data": layout.data,
        "num_microbatches": layout.num_microbatches,
        "sequences_per_microbatch": layout.sequences or config.data.sequences_per_microbatch,
        "boundaries": layout.boundaries,
        "recompute_block": layout.recompute_block,
        "recompute_everything": layout.recompute_everything,
        "step_seconds": best.step_seconds,
        "tokens_per_second": best.tokens_per_second,
        "model_flops_utilization": best.model_flops_utilization,
        "bubble_ratio": summary.bubble_ratio,
        "exposed_all_to_all_ratio": summary.exposed_all_to_all_ratio,
        "exposed_p2p_ratio": summary.exposed_p2p_ratio,
        "all_to_all_hidden_ratio": summary.all_to_all_hidden_ratio,
        "peak_memory_bytes": best.peak_bytes,
        "overhead_ratio": overhead.ratio,
        "overhead_ratio_same_layout": overhead.ratio_in_same_layout,
        "overhead_breakdown": overhead.breakdown,
        "settings": layout.settings(config),
    }
