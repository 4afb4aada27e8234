"""Oracles: claims computed by hand, parts run once and again, exact mixes, the files on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mhc_kernels.seam import make_backend

from mhc_dist.config import load_config
from mhc_dist.model.hyper_connection import HyperConnection
from mhc_dist.model.initialize import initialize
from mhc_dist.model.language_model import LanguageModel
from mhc_dist.study import sinkhorn as sinkhorn_study
from mhc_dist.study import stability
from mhc_dist.study.code_mark import code_mark
from mhc_dist.study.instruments import gains_of, gains_over_depth, probe_by_layer
from mhc_dist.study.part import PartPlan, run_part
from mhc_dist.study.summary import summarize
from mhc_dist.study.variants import VARIANTS, variant_config

CONFIG = Path(__file__).parents[3] / "configs" / "study.yaml"
SHORT = (
    "model.num_layers=3",
    "model.num_dense_layers=3",
    "model.hidden_size=32",
    "data.sequence_length=32",
    "data.sequences_per_microbatch=2",
    "train.steps=6",
    "train.validation_batches=1",
)


def result(variant: str, loss: float, gain: float, seed: int = 0) -> dict[str, Any]:
    record = {
        "step": 1,
        "loss": 3.0,
        "grad_norm": 0.5,
        "forward_gain": gain,
        "backward_gain": gain / 2,
        "single_forward_gain": 1.0,
        "single_backward_gain": 1.0,
        "row_residual": 0.0,
        "column_residual": 1e-4,
    }
    return {
        "variant": variant,
        "seed": seed,
        "commit": "abc",
        "records": [record],
        "validation_loss": loss,
        "seconds": 1.0,
        "cpu_seconds": 0.5,
    }


def results(variant: str, *losses: float, gain: float = 1.0) -> list[dict[str, Any]]:
    """One for each seed."""
    return [result(variant, loss, gain, seed) for seed, loss in enumerate(losses)]


def test_claims() -> None:
    """Oracle: by hand. HC's smallest gain at the end is 12 / 2, mHC's largest 1.5; gaps of -0.1 and 0.1 have
    a standard error of 0.1, and two values 1 degree of freedom.
    """
    parts = {
        "residual": results("residual", 2.1, 2.1),
        "hc": [result("hc", 2.5, 30.0, 0), result("hc", 2.5, 12.0, 1)],
        "mhc": [result("mhc", 2.0, 1.2, 0), result("mhc", 2.2, 1.5, 1)],
    }
    summary = summarize(parts)
    claims = summary["claims"]
    assert claims["mhc_gain_at_most_2"] == {"holds": True, "largest_gain": 1.5}
    assert claims["hc_gain_above_10_times_mhc"] == {
        "holds": False, "ratio": 4.0, "largest_ratio": 20.0,
    }  # fmt: skip
    loss = claims["mhc_loss_not_above_residual"]
    assert loss["holds"] is True
    assert loss["difference"] == pytest.approx(0.0)
    assert loss["noise"] == pytest.approx(1.2706)
    assert loss["interval"] == pytest.approx([-1.2706, 1.2706])
    assert summary["variants"]["hc"]["last_forward_gain"] == [30.0, 12.0]
    parts["hc"][1]["records"][0]["backward_gain"] = 16.0
    assert summarize(parts)["claims"]["hc_gain_above_10_times_mhc"]["ratio"] == 8.0
    assert (summary["cpu_seconds"], summary["commits"]) == (3.0, ["abc"])
    one_seed = summarize({name: some[:1] for name, some in parts.items()})["claims"]
    assert one_seed["mhc_loss_not_above_residual"]["holds"] is None


def test_what_a_seed_does_to_both_is_no_noise() -> None:
    """Oracle: by hand. A seed costs one, two or three; gaps of 0.02, 0.03 and 0.04, in any order, have a
    standard error of 0.01 / sqrt(3), of which three values need 4.303.
    """
    parts = {"residual": results("residual", 2, 3, 4), "mhc": results("mhc", 2.02, 3.03, 4.04)[::-1]}
    claim = summarize(parts)["claims"]["mhc_loss_not_above_residual"]
    assert claim["difference"] == pytest.approx(0.03)
    assert claim["noise"] == pytest.approx(0.01 * 4.303 / 3**0.5)
    assert (claim["holds"], claim["seeds"]) == (False, 3)


def test_claims_that_fail_say_so() -> None:
    """Oracle: by hand. Backward gains count as well; a limit itself is kept, what is above it is not."""
    parts = {
        "residual": results("residual", 2.00, 2.02),
        "hc": results("hc", 2.5, 2.5, gain=15.0),
        "mhc": results("mhc", 2.2, 2.225),
        "mhc_zero_bias": results("mhc_zero_bias", 2.3, 2.321),
    }
    parts["mhc"][1]["records"][0]["backward_gain"] = 2.5
    claims = summarize(parts)["claims"]
    assert claims["mhc_gain_at_most_2"] == {"holds": False, "largest_gain": 2.5}
    assert claims["hc_gain_above_10_times_mhc"] == {
        "holds": False, "ratio": 3.0, "largest_ratio": 6.0,
    }  # fmt: skip
    loss = claims["mhc_loss_not_above_residual"]
    assert (loss["holds"], loss["difference"]) == (False, pytest.approx(0.2025))
    assert loss["noise"] == pytest.approx(12.706 * 0.0025)
    assert claims["identity_leaning_not_above_zero_bias"]["holds"] is True
    parts["mhc"][1]["records"][0]["backward_gain"] = 2.0
    assert summarize(parts)["claims"]["mhc_gain_at_most_2"]["holds"] is True
    parts["mhc"], parts["mhc_zero_bias"] = parts["mhc_zero_bias"], parts["mhc"]
    assert summarize(parts)["claims"]["identity_leaning_not_above_zero_bias"]["holds"] is False
    assert summarize({"mhc": parts["mhc"]})["claims"].keys() == {"mhc_gain_at_most_2"}


def test_gains_are_those_of_the_product_of_all_mixes() -> None:
    """Oracle: numpy's product, last sublayer leftmost, of matrices put into the model by hand, with signs."""
    config = variant_config(load_config(CONFIG, SHORT), "hc", 0)
    model = LanguageModel(config, make_backend("cpu"))
    initialize(model, config)
    mixes = np.random.default_rng(0).normal(size=(6, 4, 4))
    connections = [
        connection
        for layer in model.layers
        for connection in (layer.attention_connection, layer.feed_forward_connection)
    ]
    with torch.no_grad():
        for connection, mix in zip(connections, mixes, strict=True):
            assert isinstance(connection, HyperConnection)
            connection.alpha_3.zero_()
            connection.bias_M[8:] = torch.from_numpy(mix).flatten()
        probe = probe_by_layer(model, 1)
        probe.arm(1)
        model.streams(torch.arange(64).view(2, 32))
    figures = probe.take()
    assert figures is not None
    products = [reduce(lambda product, mix: mix @ product, mixes[: 2 * depth]) for depth in (1, 2, 3)]
    forward = [np.abs(product.sum(1)).max() for product in products]
    backward = [np.abs(product.sum(0)).max() for product in products]
    gains = gains_of(figures)
    assert gains["forward_gain"] == pytest.approx(forward[-1], rel=1e-5)
    assert gains["backward_gain"] == pytest.approx(backward[-1], rel=1e-5)
    assert gains["single_forward_gain"] == pytest.approx(np.abs(mixes.sum(2)).max(), rel=1e-5)
    assert gains["single_backward_gain"] == pytest.approx(np.abs(mixes.sum(1)).max(), rel=1e-5)
    depth = gains_over_depth(figures)
    assert depth["forward"] == pytest.approx(forward, rel=1e-5)
    assert depth["backward"] == pytest.approx(backward, rel=1e-5)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_is_a_run_of_its_own(variant: str) -> None:
    """Oracle: the residual section asked for; the data and all else as in the file."""
    config = load_config(CONFIG, SHORT)
    changed = variant_config(config, variant, seed=5)
    for key, value in VARIANTS[variant].items():
        assert getattr(changed.residual, key) == value
    assert changed.train.seed == 5
    assert (changed.data, changed.model, changed.optim) == (config.data, config.model, config.optim)


def test_unknown_variants_are_refused() -> None:
    """Oracle: the known names in the message."""
    with pytest.raises(ValueError, match=r"'mch': choose from residual, hc"):
        variant_config(load_config(CONFIG), "mch", 0)


def test_a_part_is_run_once_and_again_when_the_run_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the file's time of change; a seed gives the same losses again; other code, other parts."""
    plan = PartPlan(CONFIG, SHORT, "mhc", 1, tmp_path)
    first = run_part(plan)
    changed = plan.path.stat().st_mtime_ns
    assert run_part(plan) == first
    assert plan.path.stat().st_mtime_ns == changed
    assert [record["step"] for record in first["records"]] == [1, 2, 3, 4, 5, 6]
    assert first["records"][-1]["loss"] < first["records"][0]["loss"]
    assert len(first["depth"]["forward"]) == 3

    plan.path.unlink()
    again = run_part(plan)
    assert [record["loss"] for record in again["records"]] == [record["loss"] for record in first["records"]]

    longer = PartPlan(CONFIG, (*SHORT, "train.steps=7"), "mhc", 1, tmp_path)
    assert longer.done() is None
    assert len(run_part(longer)["records"]) == 7

    monkeypatch.setattr("mhc_dist.study.part.code_mark", lambda files: "of another version")
    assert longer.done() is None


def test_code_is_marked_by_what_is_in_the_files(tmp_path: Path) -> None:
    """Oracle: one byte changed, in a folder; a file that is gone is an error, not a mark."""
    inner = tmp_path / "package" / "deep"
    inner.mkdir(parents=True)
    inner.joinpath("a.py").write_text("x = 1\n")
    alone = tmp_path / "b.py"
    alone.write_text("")
    before = code_mark([tmp_path / "package", alone])
    assert code_mark([alone, tmp_path / "package"]) == before
    inner.joinpath("a.py").write_text("x = 2\n")
    assert code_mark([tmp_path / "package", alone]) != before
    alone.unlink()
    with pytest.raises(FileNotFoundError):
        code_mark([alone])


class PoolOfThisProcess:
    """Runs parts where the test is, and notes them; a machine that goes down before part `stop`."""

    ran: ClassVar[list[str]] = []
    stop: ClassVar[int] = 10

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> PoolOfThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, run: Callable[[PartPlan], dict[str, Any]], plan: PartPlan) -> Future[dict[str, Any]]:
        if len(self.ran) == self.stop:
            raise KeyboardInterrupt
        self.ran.append(plan.path.name)
        future: Future[dict[str, Any]] = Future()
        future.set_result(run(plan))
        return future


def test_study_continues_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: which parts are trained after an interruption with a damaged file, and when all are there."""
    settings = [part for value in SHORT for part in ("--set", value)]
    parts = tmp_path / "parts"
    folders = ["--parts", str(parts), "--results", str(tmp_path / "results")]
    arguments = ["--config", str(CONFIG), *settings, "--variants", "hc", "mhc", "--options", *folders]
    monkeypatch.setattr(stability, "ProcessPoolExecutor", PoolOfThisProcess)
    ran: list[str] = []
    monkeypatch.setattr(PoolOfThisProcess, "ran", ran)
    monkeypatch.setattr(PoolOfThisProcess, "stop", 1)
    assert stability.main([*arguments, "--seeds", "1"]) == 83
    assert f"what is done lies in {parts}" in capsys.readouterr().out
    assert ran == ["hc_seed0.json"]

    monkeypatch.setattr(PoolOfThisProcess, "stop", 10)
    parts.joinpath("mhc_seed0.json").write_text(parts.joinpath("hc_seed0.json").read_text()[:-100])
    assert stability.main([*arguments, "--seeds", "1"]) == 0
    assert ran == ["hc_seed0.json", "mhc_seed0.json"]
    capsys.readouterr()

    monkeypatch.setattr(PoolOfThisProcess, "stop", 0)
    assert stability.main([*arguments, "--seeds", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 of 2 parts are there already"
    claims = json.loads(said[-1])
    assert claims["hc_gain_above_10_times_mhc"]["ratio"] > 0
    document = json.loads((tmp_path / "results" / "study_stability.json").read_text())
    assert document["figures"]["claims"] == claims
    assert document["figures"]["cpu_seconds"] > 0
    assert document["label"].startswith("measured")
    assert (tmp_path / "results" / "study_stability.png").stat().st_size > 10_000
    assert stability.main([*arguments, "--seeds", "0"]) == 2
    assert "--seeds 0" in capsys.readouterr().err


def test_sinkhorn_study(tmp_path: Path) -> None:
    """Oracle: what iterations are for: column residuals fall; exact mixes need none; bf16 has 8 bits."""
    assert sinkhorn_study.main(["--tokens", "4", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "study_sinkhorn.png").stat().st_size > 10_000
    figures = json.loads((tmp_path / "study_sinkhorn.json").read_text())["figures"]
    assert len(figures["cases"]) == 3 * 2 * 2
    for name, case in figures["cases"].items():
        assert case["iterations"][0] == 1
        assert case["iterations"][-1] == 40
        assert case["column_residual"][0] > case["column_residual"][-1]
        assert max(case["row_residual"][1:]) < 1e-5  # rows are scaled last
        assert (max(case["difference"]) < 1e-6) == ("fp32, paper" in name)
    for name, exact in figures["exact"].items():
        assert max(exact["row_residual"], exact["column_residual"]) < 1e-6
        assert exact["gain"] == pytest.approx(1.0, abs=1e-5)
        assert (exact["difference"] < 1e-6) == name.endswith("fp32")
    torch.testing.assert_close(
        sinkhorn_study.random_logits(2, 4, 3.0), 3 * sinkhorn_study.random_logits(2, 4, 1.0)
    )
    assert sinkhorn_study.main(["--tokens", "0"]) == 2
