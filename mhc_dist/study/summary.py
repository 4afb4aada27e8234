"""What the parts of the stability study say together. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Parts = Mapping[str, Sequence[dict[str, Any]]]
"""Results by variant, one for each seed."""

NOISE_DEVIATIONS = 2.0
"""A mean difference of losses counts when it exceeds so many of its standard errors."""


def summarize(parts: Parts) -> dict[str, Any]:
    """Losses and gains by variant, the claims that can be checked from them, what the parts cost together.

    commits: at which the parts were run, as a part is kept as long as its configuration stays.
    """
    variants = {name: _variant(results) for name, results in parts.items()}
    everything = [result for results in parts.values() for result in results]
    return {
        "variants": variants,
        "claims": _claims(parts, variants),
        "cpu_seconds": sum(result["cpu_seconds"] for result in everything),
        "commits": sorted({result["commit"] for result in everything}),
    }


def _variant(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    validation = [result["validation_loss"] for result in results]
    summary: dict[str, Any] = {
        "seeds": len(results),
        "validation_loss": statistics.mean(validation),
        "validation_loss_deviation": statistics.stdev(validation) if len(validation) > 1 else None,
        "largest_grad_norm": max(record["grad_norm"] for r in results for record in r["records"]),
        "seconds": statistics.mean(result["seconds"] for result in results),
        "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in results),
    }
    measured = [record for r in results for record in r["records"] if "forward_gain" in record]
    for key in ("forward_gain", "backward_gain", "single_forward_gain", "single_backward_gain"):
        summary[f"largest_{key}"] = max((record[key] for record in measured), default=None)
    last = [[record for record in r["records"] if "forward_gain" in record][-1:] for r in results]
    for key in ("forward_gain", "backward_gain"):
        values = [records[0][key] for records in last if records]
        summary[f"last_{key}"] = statistics.mean(values) if values else None
    for key in ("row_residual", "column_residual"):
        summary[f"largest_{key}"] = max((record[key] for record in measured), default=None)
    return summary


def _claims(parts: Parts, variants: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    claims: dict[str, Any] = {}
    if "mhc" in variants:
        gain = _largest(variants["mhc"])
        claims["mhc_gain_at_most_2"] = {"holds": gain <= 2.0, "largest_gain": gain}
    if {"mhc", "hc"} <= variants.keys():
        ratio = _largest(variants["hc"]) / _largest(variants["mhc"])
        claims["hc_gain_above_10_times_mhc"] = {"holds": ratio > 10.0, "ratio": ratio}
    if {"mhc", "residual"} <= variants.keys():
        claims["mhc_loss_not_above_residual"] = _not_above(parts["mhc"], parts["residual"])
    if {"mhc", "mhc_zero_bias"} <= variants.keys():
        claims["identity_leaning_not_above_zero_bias"] = _not_above(parts["mhc"], parts["mhc_zero_bias"])
    return claims


def _largest(variant: dict[str, Any]) -> float:
    return max(float(variant["largest_forward_gain"]), float(variant["largest_backward_gain"]))


def _not_above(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the mean validation loss of `one` is at most the other's, up to the noise of seeds.

    Compared seed by seed: with the same seed two kinds start from the same weights where they have the same
    parameters, and see the same text, so what a seed does to both cancels.
    """
    baselines = {result["seed"]: result["validation_loss"] for result in other}
    gaps = [r["validation_loss"] - baselines[r["seed"]] for r in one if r["seed"] in baselines]
    if len(gaps) < 2:
        return {"holds": None, "difference": statistics.mean(gaps) if gaps else None, "noise": None}
    difference = statistics.mean(gaps)
    noise = NOISE_DEVIATIONS * statistics.stdev(gaps) / len(gaps) ** 0.5
    return {"holds": difference <= noise, "difference": difference, "noise": noise, "seeds": len(gaps)}
