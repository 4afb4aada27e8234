"""The survey as a cluster file for `mhc-dist plan --cluster FILE`: each number with where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import yaml

from mhc_dist.plan.cluster import Cluster
from mhc_dist.preflight.findings import Report
from mhc_dist.preflight.measure import PairLink


def cluster(report: Report, name: str) -> Cluster:
    """Medians over ranks and links. What a survey cannot know is an assumption that says so."""
    nodes = list(report.nodes.values())
    ranks_per_node = max(len(ranks) for ranks in nodes)
    fact = report.facts[0]
    measured = (
        f"measured: mhc-dist preflight, {len(report.facts)} ranks on {len(nodes)} nodes, {report.library}"
    )

    def constant(value: float, source: str = measured) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "source": source}

    def middle(attribute: str) -> dict[str, Any]:
        return constant(statistics.median(getattr(found, attribute) for found in report.compute))

    inside = _link(report, [link for link in report.links if report.inside(link)], constant)
    across = _link(report, [link for link in report.links if not report.inside(link)], constant)
    if inside is None or across is None:
        other = "assumption: as the other level, this one has no pair of ranks"
        known = inside or across or _nothing_measured()
        copied = {key: constant(entry["value"], other) for key, entry in known.items()}
        inside, across = inside or copied, across or copied
    return Cluster.model_validate(
        {
            "name": name,
            "description": f"{len(nodes)} nodes as mhc-dist preflight found them: {fact.host} and others",
            "devices_per_node": ranks_per_node,
            "num_nodes": len(nodes),
            "device": {
                "name": fact.devices[0] if fact.devices else f"{fact.num_cpus} CPU cores",
                "matmul_flops": {"bf16": middle("bf16_flops"), "fp32": middle("fp32_flops")},
                "matmul_efficiency": constant(1.0, "the rate above is what products of matrices sustain"),
                "attention_efficiency": constant(0.5, "assumption: half of what large products reach"),
                "memory_bytes": constant(
                    fact.free_memory_bytes / ranks_per_node, f"{measured}; free memory by ranks of a node"
                ),
                "usable_memory": constant(0.9, "assumption: the rest goes to the runtime and buffers"),
                "memory_bytes_per_second": middle("copy_bytes_per_second"),
                "memory_efficiency": constant(1.0, "the rate above is what copies sustain"),
                "compute_share": constant(1.0, "assumption: communication takes no multiprocessor"),
            },
            "node_link": inside,
            "network_link": across,
        }
    )


def cluster_text(found: Cluster) -> str:
    """YAML that `load_cluster` reads back."""
    text: str = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False, width=110)
    return f"# Written by mhc-dist preflight. SI units, one way, per rank.\n{text}"


def _link(report: Report, links: Sequence[PairLink], constant: Any) -> dict[str, Any] | None:
    if not links:
        return None
    return {
        "bytes_per_second": constant(statistics.median(link.bytes_per_second for link in links)),
        "latency_seconds": constant(statistics.median(link.latency_seconds for link in links)),
    }


def _nothing_measured() -> dict[str, Any]:
    """One rank has no link at all; a plan for it needs none, but a file has to have numbers."""
    return {"bytes_per_second": {"value": 1e9}, "latency_seconds": {"value": 1e-4}}
