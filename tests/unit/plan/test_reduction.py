"""Seconds on links, and of matrices bound by memory or by their precision: figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from mhc_kernels.tiles import tiles_for

from mhc_dist.config import load_config
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.schedules.registry import make_schedule
from mhc_dist.plan.charge import Charge
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.connection_rows import connection_work
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


def table_of(layout: Layout, *overrides: str, charge: Charge | None = None) -> CostTable:
    """Costs of the 27B model on H800s."""
    config = load_config(CONFIGS / "paper_27b.yaml", list(overrides))
    ranks = make_schedule(layout.schedule, layout.pipeline, layout.num_microbatches).chunk_rank
    shapes = planned_shapes(config, ranks, layout)
    return CostModel(config, Machine(load_cluster("h800"))).table(layout, shapes, ranks, charge)


@pytest.mark.parametrize(
    ("expert", "lane", "seconds"),
    [
        (8, "node", 7 / 8 / NODE),
        (24, "network", 16 / 24 / PORT),  # three whole nodes
        (6, "network", 4 / 6 / PORT),  # some have two members in one node and four in the next
        (12, "network", 8 / 12 / PORT),  # four in one node, eight in the next
        (9, "network", 8 / 9 / PORT),  # one is alone in its node
    ],
)
def test_expert_groups_that_straddle_nodes_wait_for_their_loneliest(
    expert: int, lane: str, seconds: float
) -> None:
    """Oracle: by hand, nodes of eight, for one byte: what a rank sends to other nodes passes its one port."""
    table = table_of(Layout("1f1b", 4, expert, 72, 4))
    dispatch = next(cost for (_, name), cost in table.exchanges.items() if name.startswith("dispatch"))
    payload = 4096 * 6 * 2560 * 2
    latency = 2.5e-5 if lane == "node" else 4.0e-5
    assert dispatch.lane == lane
    assert dispatch.forward == pytest.approx(latency + seconds * payload)


@pytest.mark.parametrize(("precision", "rate"), [("bf16", 9.894e14 / 2), ("fp32", 6.7e13)])
def test_connections_by_their_place_in_the_model(precision: str, rate: float) -> None:
    """Oracle: by hand, rows beyond those of the plain residual. The first phase writes four streams for one
    row and runs a dense layer and half of another; the last one ends the chain and reads the streams twice
    for the head's input. Kernels multiply bf16 streams in tf32, at half the rate of bf16, fp32 ones in fp32.
    """
    assert tiles_for("sm_90", 4, 2560).precision == tiles_for("sm_100", 4, 2560).precision == "tf32"
    work = connection_work(load_config(CONFIGS / "paper_27b.yaml", [f"train.precision={precision}"]))
    row = 4096 * 2560 * (2 if precision == "bf16" else 4) / (3.35e12 * 0.8)
    projection = 4096 * 2 * 4 * 2560 * 24 / (rate * 0.65)
    crossings = {(0, "attention.1"): 4, (0, "attention.5"): 2, (1, "finish"): 0}
    forward = {
        (0, "attention.1"): (5 - 2) + (work.enter - 2) + 3 * (work.cross - 4),
        (0, "attention.5"): 2 * (work.cross - 4),
        (1, "finish"): (9 - 3) + (9 - 2),
    }
    backward = {
        (0, "attention.1"): (5 - 2) + (work.enter_backward - 4) + 3 * (work.cross_backward - 4),
        (0, "attention.5"): 2 * (work.cross_backward - 4),
        (1, "finish"): 14 + (14 - 3),
    }
    table, plain = (
        table_of(Layout("1f1b", 2, 1, 1, 4), f"train.precision={precision}", charge=Charge(kernels=kernels))
        for kernels in (True, False)
    )
    for phase, number in crossings.items():
        more = table.phases[phase].forward - plain.phases[phase].forward
        assert more == pytest.approx(forward[phase] * row + number * projection)
        more = table.phases[phase].input_gradient - plain.phases[phase].input_gradient
        assert more == pytest.approx(backward[phase] * row + 2 * number * projection)


def test_each_phase_regenerates_its_streams_by_itself() -> None:
    """Oracle: by hand, what `SeamKeeper.regenerate` calls. Opened streams are read for one input; then each
    sublayer reads y and writes streams and an input. A later phase finishes the sublayer before it by itself,
    so those streams are written and read once more.
    """
    table = table_of(Layout("1f1b", 2, 1, 1, 4, recompute_block=4))
    value = 4096 * 2560 * 2 / (3.35e12 * 0.8)
    floats = 4 / (2560 * 2)
    own = (8 + 16 + 1 + 2560 / 4096) * floats
    opened, first, next_one = 4 + 1 + own, (4 + 1 + 4) + (4 + 1) + own + 20 * floats, 1 + 4 + 1 + own
    assert table.phases[0, "attention.1"].recompute == pytest.approx((opened + 3 * next_one) * value)
    for name in ("attention.2", "attention.5"):
        assert table.phases[0, name].recompute == pytest.approx((first + next_one) * value)
    assert table.phases[1, "finish"].recompute == 0.0
