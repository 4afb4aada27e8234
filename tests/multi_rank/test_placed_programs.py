"""Placed programs on real ranks: gradients bit-equal to those of the plain lowering, whatever the costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import tests.multi_rank.pipeline_case as case
from mhc_dist.config import RunConfig
from mhc_dist.pipeline.action import ActionKind, Program
from mhc_dist.pipeline.place import candidates
from mhc_dist.pipeline.placement import Placement
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import placed_program, run_costs
from tests.multi_rank.harness import run_ranks
from tests.small import small_config

TRAINED = ("1f1b", "zb1p", "zbv", "dualpipev", "interleaved", "gpipe")
LATE = Placement(prefetch_recompute=False)
"""Recomputation right before its use, as others place it."""
LATE_COUNTS = Placement(late_counts=True)


def slow_machine() -> Machine:
    """Its link is so slow that placement moves whatever it may."""
    cluster = load_cluster("laptop")
    link = cluster.node_link.model_copy(
        update={"bytes_per_second": cluster.node_link.bytes_per_second.model_copy(update={"value": 2e7})}
    )
    return Machine(cluster.model_copy(update={"node_link": link}))


def slow_link_program(config: RunConfig, placement: Placement | None = None) -> Program:
    return placed_program(config, slow_machine(), placement)


def looking_ahead(config: RunConfig) -> Program:
    """The last of the programs that begin passes in gaps of the slot before: the furthest from the plain."""
    chunks, costs = own_shapes(config).chunks, run_costs(config, slow_machine())
    program, _ = candidates(schedule_of(config), chunks, costs, Placement(thorough=True))[-1]
    return program


def gradients_of_one_that_looks_ahead(rank: int, config: RunConfig) -> case.Gradients:
    case.make_program = looking_ahead
    return case.rank_gradients(rank, config)


def placed_gradients(rank: int, config: RunConfig, placement: Placement | None = None) -> case.Gradients:
    """As `rank_gradients`, with the placed program. Ranks are forked, so the change stays in this one."""
    case.make_program = partial(slow_link_program, placement=placement)
    return case.rank_gradients(rank, config)


def config_of(schedule: str, recompute: str, block: int | str = "auto") -> RunConfig:
    return small_config(
        model={"num_layers": 5},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": schedule, "num_microbatches": 6},
        recompute={"mode": recompute, "block": block},
    )


def check_bits(got: list[case.Gradients], want: list[case.Gradients]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.loss == theirs.loss
        assert ours.by_name.keys() == theirs.by_name.keys()
        for name, gradient in theirs.by_name.items():
            assert torch.equal(ours.by_name[name], gradient), name


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [
        *((name, "none") for name in TRAINED),
        *((name, mode) for name in ("dualpipev", "zbv") for mode in ("mhc", "full")),
        ("1f1b", "mhc"),
        ("zb1p", "mhc"),
        ("interleaved", "full"),
    ],
)
def test_gradients_are_bit_equal_to_the_plain_lowering(schedule: str, recompute: str) -> None:
    """Oracle: the plain lowering of the same schedule on the same ranks, nothing recomputed, bit for bit."""
    config, plain = config_of(schedule, recompute), config_of(schedule, "none")
    placement = LATE_COUNTS if (schedule, recompute) == ("dualpipev", "mhc") else None
    assert [a for a in slow_link_program(config, placement).actions[0] if a.kind is not ActionKind.RECV] != [
        a for a in case.make_program(plain).actions[0] if a.kind is not ActionKind.RECV
    ]
    check_bits(run_ranks(4, placed_gradients, config, placement), run_ranks(4, case.rank_gradients, plain))


def test_a_pass_that_begins_early_changes_no_bit() -> None:
    """Oracle: the plain lowering, nothing recomputed."""
    config, plain = config_of("dualpipev", "mhc"), config_of("dualpipev", "none")
    chunks, costs = own_shapes(config).chunks, run_costs(config, slow_machine())
    found = candidates(schedule_of(config), chunks, costs, Placement(thorough=True))
    without, ahead = found[: len(found) // 2], found[len(found) // 2 :]
    assert ahead[-1][0].digest() != without[-1][0].digest()
    check_bits(
        run_ranks(4, gradients_of_one_that_looks_ahead, config), run_ranks(4, case.rank_gradients, plain)
    )


@pytest.mark.long
@pytest.mark.parametrize("schedule", TRAINED)
def test_no_mode_and_no_placement_changes_a_bit(schedule: str) -> None:
    """Oracle: the plain lowering, nothing recomputed. Each recompute mode and block length against it: plain,
    placed, placed with recomputation right before its use, with counts awaited late, and with passes that
    begin early.
    """
    want = run_ranks(4, case.rank_gradients, config_of(schedule, "none"))
    for recompute, block in (("none", "auto"), ("mhc", "auto"), ("mhc", 2), ("mhc", 16), ("full", "auto")):
        config = config_of(schedule, recompute, block)
        check_bits(run_ranks(4, case.rank_gradients, config), want)
        for placement in (None, LATE, LATE_COUNTS):
            check_bits(run_ranks(4, placed_gradients, config, placement), want)
        check_bits(run_ranks(4, gradients_of_one_that_looks_ahead, config), want)
