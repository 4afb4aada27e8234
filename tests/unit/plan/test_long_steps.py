"""Steps of many microbatches from shorter ones, and cells of the table that cannot be planned."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from mhc_dist.config import load_config
from mhc_dist.pipeline.summary import summarize
from mhc_dist.plan import long_steps
from mhc_dist.plan.cell import plan_cell, shared_batch
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.collector import collector_paused
from mhc_dist.plan.evaluate import build, evaluate
from mhc_dist.plan.layout import Layout
from mhc_dist.plan.long_steps import short_count
from mhc_dist.plan.machine import Machine

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["1f1b", "dualpipev", "zbv"])
def test_a_long_step_is_a_short_one_whose_middle_repeats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the whole step, simulated."""
    monkeypatch.setattr(long_steps, "SHORTEST", 16)
    config, machine = load_config(CONFIGS / "tiny.yaml"), Machine(load_cluster("h800"))
    layout = Layout(name, 2, 2, 2, 40, sequences=1, recompute_block=2)
    assert short_count(name, 2, 40) == 16
    whole = summarize(build(config, machine, layout).simulation)
    got = evaluate(config, machine, layout).summary
    assert got.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)
    assert got.compute_seconds == pytest.approx(whole.compute_seconds, rel=1e-3)
    assert got.exposed_all_to_all_ratio == pytest.approx(whole.exposed_all_to_all_ratio, abs=1e-3)
    assert got.bubble_ratio == pytest.approx(whole.bubble_ratio, abs=2e-3)
    assert got.recompute_hidden_ratio == pytest.approx(whole.recompute_hidden_ratio, abs=5e-3)
    assert max(got.peak_bytes) == max(whole.peak_bytes)


def test_counts_that_stand_for_longer_ones() -> None:
    """Oracle: by hand. Whole periods of 2P are left out; gpipe has none, short steps lose none."""
    assert short_count("dualpipev", 4, 72) == 72
    assert short_count("dualpipev", 4, 1280) == 64
    assert short_count("zbv", 8, 163) == 67
    assert short_count("gpipe", 4, 1280) == 1280


def test_devices_that_cannot_share_the_batch_get_a_larger_one() -> None:
    """Oracle: 320 = 2^6 x 5 sequences: of 1024 devices, 64 data ranks would leave 16 stages for 12 layers."""
    config = load_config(CONFIGS / "paper_3b.yaml")
    assert shared_batch(config, 64)[0] == 1
    factor, larger = shared_batch(config, 1024)
    assert (factor, larger.sequences_per_step) == (2, 640)
    with pytest.raises(ValueError, match="cannot share 320 sequences"):
        shared_batch(config, 1021)


def test_a_cell_that_does_not_fit_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a device with so little memory that weights alone exceed it."""
    monkeypatch.setattr(
        "mhc_dist.plan.search.parallel_map", lambda function, items: list(map(function, items))
    )
    config, cluster = load_config(CONFIGS / "tiny.yaml"), load_cluster("laptop")
    memory = cluster.device.memory_bytes.model_copy(update={"value": 1e6})
    device = cluster.device.model_copy(update={"memory_bytes": memory})
    cell = plan_cell(config, Machine(cluster.model_copy(update={"device": device})), 2)
    assert cell["outcome"] == "nothing_fits"
    assert cell["missing_bytes"] > 0
    assert "GB too much" in cell["message"]


def test_the_collector_is_left_as_it_was() -> None:
    """Oracle: the collector's own state, with an error inside and with a collector that was off."""

    def fail() -> None:
        with collector_paused():
            assert not gc.isenabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert gc.isenabled()
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
    gc.enable()
