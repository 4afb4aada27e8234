"""Oracle: the single-device model. Every topology and schedule must give its loss and its gradients."""

from __future__ import annotations

import pytest

from mhc_dist.config import RunConfig
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.pipeline_case import merge, oracle_gradients, rank_gradients
from tests.small import small_config

TOPOLOGIES = [(2, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 4), (2, 4, 2)]


def parity_config(topology: tuple[int, int, int], schedule: str, kind: str, **model: object) -> RunConfig:
    pipeline, data, expert = topology
    return small_config(
        model=model,
        residual={"kind": kind, "num_streams": 1 if kind == "residual" else 4},
        parallel={"pipeline": pipeline, "data": data, "expert": expert},
        schedule={"name": schedule, "num_microbatches": max(4, 2 * pipeline)},
    )


@pytest.mark.parametrize("kind", ["residual", "mhc"])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: "x".join(map(str, t)))
def test_gradients_equal_single_device(topology: tuple[int, int, int], schedule: str, kind: str) -> None:
    config = parity_config(topology, schedule, kind)
    world = topology[0] * topology[1]
    got = merge(config, run_ranks(world, rank_gradients, config))
    want = oracle_gradients(config)
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    assert got.by_name.keys() == want.by_name.keys()
    worst = {
        name: ((gradient - want.by_name[name].double()).norm() / want.by_name[name].norm().double()).item()
        for name, gradient in got.by_name.items()
        if want.by_name[name].norm() > 0
    }
    name = max(worst, key=worst.__getitem__)
    assert worst[name] < 1e-5, f"{name}: {worst[name]:.2e}"
    for name, gradient in want.by_name.items():
        if gradient.norm() == 0:
            assert got.by_name[name].abs().max() == 0, f"{name}: the oracle's gradient is zero"
