"""Seconds to reduce a step's gradients and to gather its weights. Imports no torch."""

from __future__ import annotations

from math import gcd

from mhc_dist.config import RunConfig
from mhc_dist.plan.cluster import Cluster
from mhc_dist.plan.layout import Layout, Shapes
from mhc_dist.plan.static_memory import MAIN_GRADIENT_BYTES, held_by_rank


def gradient_seconds(
    config: RunConfig, cluster: Cluster, layout: Layout, shapes: Shapes, chunk_rank: tuple[int, ...]
) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of weights on the slowest rank, after the last W; one
    flat buffer after the other. Experts are reduced over the data ranks that hold the same ones.
    """
    moved = MAIN_GRADIENT_BYTES + (2 if config.train.precision == "bf16" else 4)
    replicas = layout.data // layout.expert
    return max(
        ring_seconds(cluster, held.shared * moved, layout.data, 1)
        + ring_seconds(cluster, held.experts * moved, replicas, layout.expert)
        for held in held_by_rank(config, layout, shapes, chunk_rank)
    )


def ring_seconds(cluster: Cluster, num_bytes: float, num_ranks: int, stride: int) -> float:
    """A reduce-scatter or all-gather of `num_bytes` over `num_ranks` ranks that lie `stride` apart, latency
    left out.

    Every rank passes (ranks - 1) / ranks of the bytes on. Inside a node they take its links. Between nodes
    each member in a node has a network port of its own, and rings share the bytes, one ring a port; what
    travels inside the node still takes its links.
    """
    if num_ranks == 1:
        return 0.0
    passed = num_bytes * (num_ranks - 1) / num_ranks
    inside = passed / cluster.node_link.bytes_per_second.value
    span = num_ranks * stride
    # Of a node, the part that the group fills in every node it touches.
    together = gcd(span, cluster.devices_per_node)
    if together == span:
        return inside
    members = max(1, together // stride)
    across = passed / members / cluster.network_link.bytes_per_second.value
    return across if members == 1 else max(inside, across)
