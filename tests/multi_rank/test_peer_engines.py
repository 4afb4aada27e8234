"""Other engines over our layers, on the benches' link. Oracle: the single-device model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhc_dist.bench.cell import Cell, run_ranks
from mhc_dist.bench.pace import Nominal, Pace, RealTime
from mhc_dist.bench.peers.deepspeed_dualpipev import DeepSpeedDualPipeV
from mhc_dist.bench.peers.ranks import check_equal
from mhc_dist.bench.peers.torch_dualpipev import TorchDualPipeV
from mhc_dist.config import RunConfig
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.pipeline.action import PhaseShape
from mhc_dist.pipeline.cost import CostTable, PhaseCost
from mhc_dist.plan.layout import own_shapes
from tests.multi_rank.pipeline_case import Gradients, merge, oracle_gradients, own_microbatches
from tests.small import small_config

ENGINES = {"deepspeed": DeepSpeedDualPipeV, "torch": TorchDualPipeV}
MILLISECOND = 1e-3


def peers_config(pipeline: int) -> RunConfig:
    return small_config(
        model={"num_layers": 2 * pipeline + 1},
        parallel={"pipeline": pipeline, "data": 2, "expert": 2},
        schedule={"name": "dualpipev", "num_microbatches": 2 * pipeline + 1},
    )


def short_times(config: RunConfig) -> CostTable:
    phases = {
        (index, item.name): PhaseCost(MILLISECOND, MILLISECOND, MILLISECOND)
        for index, chunk in enumerate(own_shapes(config).chunks)
        for item in chunk.items
        if isinstance(item, PhaseShape)
    }
    return CostTable(phases, {})


def one_step(
    rank: int, store: str, config: RunConfig, name: str, paced: bool, folder: Path, result: Path
) -> None:
    """Leaves this rank's loss and gradients in `folder`."""
    links = [(0, 1), (1, 0)] if config.parallel.pipeline > 1 else []
    # The oracle's routers decide for themselves, so these do, too.
    cell = Cell.join(rank, store, config, links, routing="untrained")
    cell = replace(cell, microbatches=own_microbatches(config, cell.topology))
    cell.route.link = EmulatedLink(MILLISECOND, 1e7)
    pace: Pace = Nominal(short_times(config)) if paced else RealTime()
    engine = ENGINES[name](cell, pace, hide_shared=paced)
    losses = engine.step()
    loss = torch.stack(losses).mean().item() if losses else None
    first_expert = cell.topology.expert_rank * cell.exchange.num_local_experts
    torch.save((loss, experts_apart(engine.gradients(), first_expert)), folder / str(rank))
    result.write_text("{}")
    cell.leave()


def experts_apart(gradients: dict[str, Tensor], first_expert: int) -> dict[str, Tensor]:
    """Stacked experts by their number in the whole model."""
    apart: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        path, found, leaf = name.partition(".experts.")
        if not found:
            apart[name] = gradient
            continue
        for local, of_expert in enumerate(gradient):
            apart[f"{path}.experts.{first_expert + local}.{leaf}"] = of_expert
    return apart


@pytest.mark.parametrize("paced", [False, True], ids=["real", "nominal"])
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_computes_what_one_device_computes(
    name: str, pipeline: int, paced: bool, tmp_path: Path
) -> None:
    """Oracle: the single-device model, loss and every gradient; with pipeline 2, torch splits backwards."""
    config = peers_config(pipeline)
    run_ranks(one_step, config, name, paced, tmp_path)
    ranks = [Gradients(*torch.load(tmp_path / str(rank))) for rank in range(config.num_processes)]
    got, want = merge(config, ranks), oracle_gradients(config)
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    assert got.by_name.keys() == want.by_name.keys()
    for key, gradient in want.by_name.items():
        error = (got.by_name[key] - gradient.double()).abs().max() / gradient.abs().max().clamp_min(1e-12)
        assert error < 1e-5, (key, float(error))


class Fake:
    """An engine whose results are given."""

    def __init__(self, loss: float, **gradients: list[float]) -> None:
        self._loss = loss
        self._gradients = {name: torch.tensor(values) for name, values in gradients.items()}

    def step(self) -> list[Tensor]:
        return [torch.tensor(self._loss)]

    def gradients(self) -> dict[str, Tensor]:
        return self._gradients

    def forget_gradients(self) -> None: ...


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (Fake(2.1, a=[1.0, 4.0]), "computes another loss of microbatch 0 than ours"),
        (Fake(2.0, a=[1.0001, 4.0]), "computes another gradient of a than ours"),
        (Fake(2.0, a=[1.0, float("nan")]), "computes another gradient of a than ours"),
        (Fake(2.0, b=[1.0, 4.0]), "has other losses or gradients than ours"),
    ],
    ids=["loss", "gradient", "not a number", "parameter"],
)
def test_engines_that_differ_are_not_timed(other: Fake, complaint: str) -> None:
    """Oracle: results written by hand, off by more than 1e-5 of their norm."""
    ours = Fake(2.0, a=[1.0, 4.0])
    check_equal({"ours": ours, "same": Fake(2.0, a=[1.00001, 4.0])})
    with pytest.raises(RuntimeError, match=f"other {complaint}"):
        check_equal({"ours": ours, "other": other})
