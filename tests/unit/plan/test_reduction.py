"""Seconds on links, of matrices with what they read and write, and of what their precision makes of them."""

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
from mhc_dist.topology import Topology

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


def test_experts_that_few_tokens_choose_cost_the_bytes_of_all() -> None:
    """Oracle: by hand. 72 experts of 3 x 2560 x 1536 weights: reading and writing their fp32 gradients takes
    8 bytes a weight; multiplying takes 2 operations for each of six experts of 4096 tokens, whose products
    read and write 2560 + 3072 and 1536 + 2560 values.
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
    memory = 3.35e12 * 0.8
    multiplying = 4096 * 6 * 2 * one / (9.894e14 * 0.745)
    values = 4096 * 6 * (2560 + 3072 + 1536 + 2560) * 2 / memory
    assert costs[1].weight_gradient == pytest.approx(multiplying + values + 72 * one * 8 / memory)
    assert costs[8].weight_gradient == pytest.approx(multiplying / 0.848 + values + 9 * one * 8 / memory)
    # Where all experts are here, multiprocessors do not communicate.
    more = (72 - 9) * one * 2 / memory - multiplying * (1 / 0.848 - 1)
    assert costs[1].forward - costs[8].forward == pytest.approx(more)


DEEPGEMM = {
    0.745: (
        (1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590),
        (1, 4096, 7168, 16384, 1358), (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025),
        (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099),
        (8, 4096, 4096, 7168, 1288), (8, 4096, 7168, 2048, 1093),
    ),
    0.855: (
        (1, 4096, 2112, 7168, 1127), (1, 4096, 24576, 1536, 1212), (1, 4096, 32768, 512, 775),
        (1, 4096, 7168, 16384, 1520), (1, 4096, 4096, 7168, 1410), (1, 4096, 7168, 2048, 1168),
        (4, 8192, 4096, 7168, 1346), (4, 8192, 7168, 2048, 1214),
        (8, 4096, 4096, 7168, 1346), (8, 4096, 7168, 2048, 1214),
        (1, 1024, 4096, 7168, 1233), (1, 1024, 7168, 2048, 925),
        (2, 512, 4096, 7168, 1040), (2, 512, 7168, 2048, 916),
    ),
}  # fmt: skip
"""Groups, M, N, K and teraflops of fp8 products with bf16 results on an H800, by the efficiency that fits
them: the README of February 2025, and that of April with kernels tuned further."""


@pytest.mark.parametrize("efficiency", DEEPGEMM)
def test_one_efficiency_holds_for_products_of_all_shapes(efficiency: float) -> None:
    """Oracle: published measurements. Twice the bf16 peak, and bytes at the rate of the cluster file, one
    after the other: every shape within 17 %, where one rate for all would miss one of ten by a quarter.
    """
    device = load_cluster("h800").device
    memory = device.memory_bytes_per_second.value * device.memory_efficiency.value
    ratios, rates = [], []
    for groups, m, n, k, teraflops in DEEPGEMM[efficiency]:
        operations, num_bytes = 2 * groups * m * n * k, groups * (m * k + n * k + 2 * m * n)
        seconds = operations / (2 * device.matmul_flops.bf16.value * efficiency) + num_bytes / memory
        ratios.append(operations / seconds / 1e12 / teraflops)
        rates.append(teraflops)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.17
    assert (max(rates[:10]) / min(rates[:10])) ** 0.5 > 1.25
    assert device.matmul_efficiency.value == min(DEEPGEMM)


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


@pytest.mark.parametrize(("kind", "columns"), [("hc", 4 + 2), ("krom", 2 * 4 + 2)])
def test_connections_without_kernels_multiply_in_fp32(kind: str, columns: int) -> None:
    """Oracle: by hand. A phase of one expert layer crosses twice: each moves 36 rows where the plain residual
    moves 4, and multiplies four streams in fp32, for which bf16 runs have no tensor cores.
    """
    overrides = (f"residual.kind={kind}", "kernels.backend=compiled")
    table, plain = (
        table_of(Layout("1f1b", 2, 1, 1, 4), *overrides, charge=Charge(kernels=kernels))
        for kernels in (True, False)
    )
    row, product = 4096 * 2560 * 2 / (3.35e12 * 0.8), 4096 * 2 * 4 * 2560 * columns / (6.7e13 * 0.745)
    ours, theirs = (costs.phases[0, "attention.5"] for costs in (table, plain))
    assert ours.forward - theirs.forward == pytest.approx(2 * ((36 - 4) * row + product))
    assert ours.input_gradient - theirs.input_gradient == pytest.approx(2 * ((72 - 4) * row + 2 * product))


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("data", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_messages_take_the_slowest_link_between_neighbours(pipeline: int, data: int) -> None:
    """Oracle: all channels of the topology, nodes of eight. Columns wait for each other at exchanges, so a
    link between two pipeline ranks is as slow as its slowest channel; and all are alike, unless four data
    ranks or fewer share a node with their neighbours.
    """
    model = CostModel(load_config(CONFIGS / "paper_27b.yaml"), Machine(load_cluster("h800")))
    layout = Layout("1f1b", pipeline, 1, data, 2 * pipeline)
    lanes: dict[tuple[int, int], bool] = {}
    for a, b in Topology(pipeline, data, 1).all_channels():
        link = (a // data, b // data)
        lanes[link] = lanes.get(link, False) or a // 8 != b // 8
    assert model.neighbour_link(layout)[1] == ("network" if any(lanes.values()) else "node")
    if data > 4:
        assert all(lanes.values())


@pytest.mark.parametrize(
    ("precision", "rate", "head", "head_back"),
    [("bf16", 9.894e14 / 2, 17 * 4 + 5, 43 * 4 + 7), ("fp32", 6.7e13, 7 * 4 + 1, 20 * 4 + 2)],
)
def test_connections_by_their_place_in_the_model(
    precision: str, rate: float, head: int, head_back: int
) -> None:
    """Oracle: by hand, rows beyond those of the plain residual. The first phase writes four streams for one
    row and runs a dense layer and half of another; the last one ends the chain and makes the head's input of
    the streams. Kernels multiply bf16 streams in tf32, at half the rate of bf16, fp32 ones in fp32.
    """
    assert tiles_for("sm_90", 4, 2560).precision == tiles_for("sm_100", 4, 2560).precision == "tf32"
    work = connection_work(load_config(CONFIGS / "paper_27b.yaml", [f"train.precision={precision}"]))
    row = 4096 * 2560 * (2 if precision == "bf16" else 4) / (3.35e12 * 0.8)
    projection = 4096 * 2 * 4 * 2560 * 24 / (rate * 0.745)
    crossings = {(0, "attention.1"): 4, (0, "attention.5"): 2, (1, "finish"): 0}
    forward = {
        (0, "attention.1"): (5 - 2) + (work.enter - 2) + 3 * (work.cross - 4),
        (0, "attention.5"): 2 * (work.cross - 4),
        (1, "finish"): (9 - 3) + head,
    }
    backward = {
        (0, "attention.1"): (5 - 2) + (work.enter_backward - 4) + 3 * (work.cross_backward - 4),
        (0, "attention.5"): 2 * (work.cross_backward - 4),
        (1, "finish"): 14 + head_back,
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
