"""Placed programs on real ranks: gradients bit-equal to those of the plain lowering, whatever the costs."""

from __future__ import annotations

import pytest
import torch

import tests.multi_rank.pipeline_case as case
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import ActionKind, Program
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import placed_program
from tests.multi_rank.harness import run_ranks
from tests.small import small_config


def slow_link_program(config: RunConfig) -> Program:
    """Placed for a link so slow that placement moves whatever it may."""
    cluster = load_cluster("laptop")
    link = cluster.node_link.model_copy(
        update={"bytes_per_second": cluster.node_link.bytes_per_second.model_copy(update={"value": 2e7})}
    )
    return placed_program(config, Machine(cluster.model_copy(update={"node_link": link})))


def placed_gradients(rank: int, config: RunConfig) -> case.Gradients:
    """As `rank_gradients`, with the placed program. Ranks are forked, so the change stays in this one."""
    case.make_program = slow_link_program
    return case.rank_gradients(rank, config)


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        *((name, "none") for name in ("1f1b", "zb1p", "zbv", "dualpipev", "interleaved", "gpipe")),
        *((name, mode) for name in ("dualpipev", "zbv") for mode in ("mhc", "full")),
    ],
)
def test_gradients_are_bit_equal_to_the_plain_lowering(schedule: str, recompute: str) -> None:
    """Oracle: the plain lowering of the same schedule on the same ranks, bit for bit."""
    config = small_config(
        model={"num_layers": 5},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": schedule, "num_microbatches": 6},
        recompute={"mode": recompute},
    )
    placed, plain = slow_link_program(config), case.make_program(config)
    assert [a for a in placed.actions[0] if a.kind is not ActionKind.RECV] != [
        a for a in plain.actions[0] if a.kind is not ActionKind.RECV
    ]
    got, want = run_ranks(4, placed_gradients, config), run_ranks(4, case.rank_gradients, config)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.loss == theirs.loss
        assert ours.by_name.keys() == theirs.by_name.keys()
        for name, gradient in theirs.by_name.items():
            assert torch.equal(ours.by_name[name], gradient), name
