"""Seconds to reduce gradients, and matrices that are read more than computed: figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_dist.config import load_config
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.costs import CostModel
from mhc_dist.plan.layout import Layout, planned_shapes
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.reduction import ring_seconds

CONFIGS = Path(__file__).parents[3] / "configs"
NODE, PORT = 1.6e11, 4.5e10


@pytest.mark.parametrize(
    ("num_ranks", "stride", "seconds"),
    [
        (1, 1, 0.0),
        (8, 1, 7 / 8 / NODE),  # one node
        (4, 2, 3 / 4 / NODE),  # experts of two: the group lies in one node
        (128, 1, 127 / 128 / NODE),  # eight ports together are faster than the node's links
        (16, 8, 15 / 16 / PORT),  # one rank a node
        (32, 4, 31 / 32 / 2 / PORT),  # two ranks a node, two ports
        (20, 1, 19 / 20 / 4 / PORT),  # 8 + 8 + 4 ranks, or 4 + 8 + 8: four ports everywhere
        (5, 1, 4 / 5 / PORT),  # across two nodes, somewhere by one port
    ],
)
def test_a_ring_has_a_port_for_each_member_of_a_node(num_ranks: int, stride: int, seconds: float) -> None:
    """Oracle: by hand, H800 nodes of eight, for one byte."""
    assert ring_seconds(load_cluster("h800"), 1.0, num_ranks, stride) == pytest.approx(seconds)


def test_experts_that_few_tokens_choose_are_bound_by_their_gradients() -> None:
    """Oracle: by hand. 72 experts of 3 x 2560 x 1536 weights: reading and writing their fp32 gradients takes
    8 bytes a weight; multiplying takes 2 operations for each of six experts of 4096 tokens.
    """
    config, cluster = load_config(CONFIGS / "paper_27b.yaml"), load_cluster("h800")
    schedule = make_schedule("1f1b", 8, 16)
    costs = {}
    for expert in (1, 8):
        layout = Layout("1f1b", 8, expert, 64, 16)
        shapes = planned_shapes(config, schedule.chunk_rank, layout)
        table = CostModel(config, Machine(cluster)).table(layout, shapes, schedule.chunk_rank)
        costs[expert] = next(cost for (_, name), cost in table.phases.items() if name.startswith("experts"))
    one = 3 * 2560 * 1536
    assert costs[1].weight_gradient == pytest.approx(72 * one * 8 / (3.35e12 * 0.8))
    assert costs[8].weight_gradient == pytest.approx(4096 * 6 * 2 * one / (9.894e14 * 0.65 * 0.848))
    assert costs[1].forward < costs[8].forward  # its multiprocessors do not communicate
