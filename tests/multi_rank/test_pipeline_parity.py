"""Oracle: the single-device model. Every schedule must give its loss and its gradients.

`test_training_parity` covers 1f1b and dualpipev over all topologies, optimizer included; here are the others.
"""

from __future__ import annotations

import pytest
import torch

from mhc_dist.config import RunConfig
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.pipeline_case import Gradients, merge, oracle_gradients, rank_gradients
from tests.small import small_config

TOPOLOGIES = [(2, 1, 1), (2, 2, 2), (4, 1, 1), (1, 4, 4), (2, 4, 2)]


def parity_config(topology: tuple[int, int, int], schedule: str, kind: str, **model: object) -> RunConfig:
    pipeline, data, expert = topology
    # A layer for each chunk of a V, and one more so that chunks are uneven; four ranks need eight.
    model.setdefault("num_layers", 5 if pipeline < 4 else 8)
    return small_config(
        model=model,
        residual={"kind": kind, "num_streams": 1 if kind == "residual" else 4},
        parallel={"pipeline": pipeline, "data": data, "expert": expert},
        schedule={"name": schedule, "num_microbatches": max(4, 2 * pipeline)},
    )


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        ("mhc", "gpipe"),
        ("mhc", "interleaved"),
        ("mhc", "zb1p"),
        ("mhc", "zbv"),
        ("hc", "zbv"),
        ("identity", "zbv"),
    ],
)
@pytest.mark.parametrize("topology", [(2, 2, 2), (4, 1, 1)], ids=lambda t: "x".join(map(str, t)))
def test_gradients_equal_single_device(topology: tuple[int, int, int], schedule: str, kind: str) -> None:
    config = parity_config(topology, schedule, kind)
    got = merge(config, run_ranks(config.num_processes, rank_gradients, config))
    check(got, oracle_gradients(config))


@pytest.mark.parametrize("boundaries", [(1, 2, 3), (2, 3, 4), "auto"])
def test_gradients_do_not_depend_on_where_the_model_is_cut(boundaries: object) -> None:
    """Oracle: the single-device model; whatever `schedule.boundaries` says."""
    config = parity_config((2, 1, 1), "dualpipev", "mhc")
    schedule = config.schedule.model_copy(update={"boundaries": boundaries})
    config = config.model_copy(update={"schedule": schedule})
    got = merge(config, run_ranks(2, rank_gradients, config))
    check(got, oracle_gradients(config))


@pytest.mark.parametrize("hot_experts", [(0, 1), (3, 7)], ids=["one rank gets all", "two of four ranks"])
def test_hot_experts_lose_no_token(hot_experts: tuple[int, ...]) -> None:
    """Oracle: the single-device model with the same routing; the ranks of the other experts get nothing."""
    config = parity_config((1, 4, 4), "dualpipev", "mhc")
    got = merge(config, run_ranks(4, rank_gradients, config, hot_experts))
    want = oracle_gradients(config, hot_experts)
    idle = [name for name in want.by_name if ".experts." in name and want.by_name[name].norm() == 0]
    assert len(idle) == 4 * 6 * 2, "6 of 8 experts in 4 layers, two matrices each"
    check(got, want)


def check(got: Gradients, want: Gradients) -> None:
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    assert got.by_name.keys() == want.by_name.keys()
    total = torch.stack([gradient.norm() for gradient in want.by_name.values()]).norm().item()
    for name, gradient in want.by_name.items():
        error = (got.by_name[name] - gradient.double()).norm().item()
        # Some gradients are zero but for rounding: hc's streams are equal at the start, so its head's scale
        # has none. The second term is the rounding of a backward pass.
        assert error < 1e-5 * gradient.norm().item() + 5e-8 * total, f"{name}: {error:.2e}"
