"""One whole pass through a chunk as a graph of what needs what. Standard library only.

Placement chooses an order of the compute nodes; exchanges start by themselves when their needs are met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    ActionKind,
    ExchangeShape,
    Pass,
    PhaseShape,
)
from mhc_dist.pipeline.flow import ChunkFlow, values_with_gradient


@dataclass(frozen=True, slots=True)
class Node:
    """A compute action, or a whole exchange (kind ISSUE). `needs` are positions in the graph.

    needs_arrival: reads what the neighbouring chunk sends.
    """

    kind: ActionKind
    item: str
    needs: tuple[int, ...]
    needs_arrival: bool = False
    direction: Pass | None = None
    has_weights: bool = False

    @property
    def is_exchange(self) -> bool:
        return self.kind is ActionKind.ISSUE


@dataclass(frozen=True)
class OpGraph:
    """Nodes in an order that respects needs. The pass is handed on once all of `leaves_after` are done."""

    nodes: tuple[Node, ...]
    leaves_after: tuple[int, ...]


def forward_graph(flow: ChunkFlow) -> OpGraph:
    """COMPUTE nodes and forward exchanges."""
    nodes: list[Node] = []
    written: dict[str, int] = {}
    for item in flow.shape.items:
        needs = tuple(dict.fromkeys(written[v] for v in item.reads if v in written))
        arrival = CHUNK_INPUT in item.reads
        if isinstance(item, ExchangeShape):
            nodes.append(Node(ActionKind.ISSUE, item.name, needs, arrival, Pass.FORWARD))
        else:
            nodes.append(Node(ActionKind.COMPUTE, item.name, needs, arrival))
        written.update(dict.fromkeys(item.writes, len(nodes) - 1))
    return OpGraph(tuple(nodes), (written[CHUNK_OUTPUT],))


def backward_graph(flow: ChunkFlow) -> OpGraph:
    """RECOMPUTE and GRADIENT nodes and backward exchanges; weight gradients follow each GRADIENT apart."""
    nodes: list[Node] = []
    recomputed: dict[str, int] = {}
    contributes: dict[str, int] = {}

    def add(node: Node) -> int:
        nodes.append(node)
        return len(nodes) - 1

    # Forward order: the phases of a block are regenerated from the block's start.
    for phase in flow.phases:
        if phase.drops:
            needs = tuple(recomputed[name] for name in phase.recompute_after)
            recomputed[phase.name] = add(Node(ActionKind.RECOMPUTE, phase.name, needs))
    for item in reversed(flow.shape.items):
        needed: list[int] = []
        for value in item.writes:
            needed += [contributes[reader.name] for reader in flow.gradient_readers[value]]
        arrival = CHUNK_OUTPUT in item.writes
        if isinstance(item, PhaseShape):
            if item.drops:
                needed.append(recomputed[item.name])
            needs = tuple(dict.fromkeys(needed))
            node = Node(ActionKind.GRADIENT, item.name, needs, arrival, has_weights=item.has_weights)
            contributes[item.name] = add(node)
        elif item.differentiable:
            needs = tuple(dict.fromkeys(needed))
            contributes[item.name] = add(Node(ActionKind.ISSUE, item.name, needs, arrival, Pass.BACKWARD))
    leaves = [contributes[reader.name] for reader in flow.gradient_readers[CHUNK_INPUT]]
    assert all(CHUNK_TARGETS not in tuple(values_with_gradient(item)) for item in flow.shape.items)
    return OpGraph(tuple(nodes), tuple(leaves))


def tails(graph: OpGraph, seconds: Callable[[Node], float]) -> tuple[float, ...]:
    """Longest path from the start of each node to the end of the graph: its urgency in list scheduling."""
    longest = [0.0] * len(graph.nodes)
    for position in reversed(range(len(graph.nodes))):
        node = graph.nodes[position]
        longest[position] += seconds(node)
        for need in node.needs:
            longest[need] = max(longest[need], longest[position])
    return tuple(longest)
