"""Oracles: claims computed by hand, parts run once and again, exact mixes, the files on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_dist.config import load_config
from mhc_dist.study import sinkhorn as sinkhorn_study
from mhc_dist.study import stability
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
    return {"variant": variant, "seed": seed, "records": [record], "validation_loss": loss, "seconds": 1.0}


def test_claims() -> None:
    """Oracle: by hand. Ratio 30 / 1.5; standard errors of (2.0, 2.2) and (2.1, 2.1) are 0.1 and 0."""
    parts = {
        "residual": [result("residual", loss, 1.0) for loss in (2.1, 2.1)],
        "hc": [result("hc", 2.5, 30.0), result("hc", 2.5, 12.0)],
        "mhc": [result("mhc", 2.0, 1.2), result("mhc", 2.2, 1.5)],
    }
    summary = summarize(parts)
    claims = summary["claims"]
    assert claims["mhc_gain_at_most_2"] == {"holds": True, "largest_gain": 1.5}
    assert claims["hc_gain_above_10_times_mhc"] == {"holds": True, "ratio": 20.0}
    loss = claims["mhc_loss_not_above_residual"]
    assert loss["holds"] is True
    assert loss["difference"] == pytest.approx(0.0)
    assert loss["noise"] == pytest.approx(0.2)
    assert summary["variants"]["hc"]["last_forward_gain"] == 21.0
    worse = summarize({**parts, "mhc": [result("mhc", loss, 1.0) for loss in (2.4, 2.4)]})["claims"]
    assert worse["mhc_loss_not_above_residual"]["holds"] is False
    one_seed = summarize({name: results[:1] for name, results in parts.items()})["claims"]
    assert one_seed["mhc_loss_not_above_residual"]["holds"] is None


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


def test_a_part_is_run_once_and_again_when_the_run_changes(tmp_path: Path) -> None:
    """Oracle: the file's time of change; the same seed gives the same losses."""
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


def test_study_continues_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the parts' files and what is printed; the second time nothing is trained."""
    settings = [part for value in SHORT for part in ("--set", value)]
    folders = ["--parts", str(tmp_path / "parts"), "--results", str(tmp_path / "results")]
    arguments = ["--config", str(CONFIG), *settings, "--variants", "hc", "mhc", "--options", *folders]
    run_part(PartPlan(CONFIG, SHORT, "hc", 0, tmp_path / "parts"))
    run_part(PartPlan(CONFIG, SHORT, "mhc", 0, tmp_path / "parts"))
    assert stability.main([*arguments, "--seeds", "1", "--workers", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 of 2 parts are there already"
    claims = json.loads(said[-1])
    assert claims["hc_gain_above_10_times_mhc"]["ratio"] > 0
    document = json.loads((tmp_path / "results" / "study_stability.json").read_text())
    assert document["figures"]["claims"] == claims
    assert document["label"].startswith("measured")
    assert (tmp_path / "results" / "study_stability.png").stat().st_size > 10_000
    assert stability.main([*arguments, "--seeds", "0"]) == 2
    assert "--seeds 0" in capsys.readouterr().err


def test_sinkhorn_study(tmp_path: Path) -> None:
    """Oracle: what iterations are for: column residuals fall; exact mixes need none."""
    figures = sinkhorn_study.run(num_tokens=8)
    for case in figures["cases"].values():
        assert case["column_residual"][0] > case["column_residual"][-1]
        assert max(case["row_residual"][1:]) < 1e-5  # rows are scaled last
    for exact in figures["exact"].values():
        assert max(exact["row_residual"], exact["column_residual"]) < 1e-6
        assert exact["gain"] == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(
        sinkhorn_study.random_logits(2, 4, 3.0), 3 * sinkhorn_study.random_logits(2, 4, 1.0)
    )
    assert sinkhorn_study.main(["--tokens", "4", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "study_sinkhorn.png").exists()
    assert sinkhorn_study.main(["--tokens", "0"]) == 2
