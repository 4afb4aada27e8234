"""What the parts of the stability study say together. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Parts = Mapping[str, Sequence[dict[str, Any]]]
"""Results by variant, one for each seed."""

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Standard errors to either side of a mean that hold the true one with 95 %, from 1, 2, ... degrees of
freedom (Student's t). Beyond ten the last one, which is a little too many.
"""


def summarize(parts: Parts) -> dict[str, Any]:
    """Losses and gains by variant, the claims that can be checked from them, what the parts cost together.

    commits: at which the parts were run, as a part is kept as long as configuration and code stay.
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
    """largest_*: of all seeds and measured steps. last_*: one for each seed, at the last measured step."""
    validation = [result["validation_loss"] for result in results]
    summary: dict[str, Any] = {
        "seeds": len(results),
        "validation_loss": statistics.mean(validation),
        "validation_loss_deviation": statistics.stdev(validation) if len(validation) > 1 else None,
        "largest_grad_norm": max(record["grad_norm"] for r in results for record in r["records"]),
        "median_grad_norm": statistics.median(
            record["grad_norm"] for r in results for record in r["records"]
        ),
        "seconds": statistics.mean(result["seconds"] for result in results),
        "cpu_seconds": statistics.mean(result["cpu_seconds"] for result in results),
    }
    by_seed = [measured for result in results if (measured := measured_records(result))]
    together = [record for measured in by_seed for record in measured]
    for key in ("forward_gain", "backward_gain", "single_forward_gain", "single_backward_gain"):
        summary[f"largest_{key}"] = max((record[key] for record in together), default=None)
    for key in ("forward_gain", "backward_gain"):
        summary[f"last_{key}"] = [measured[-1][key] for measured in by_seed]
    for key in ("row_residual", "column_residual"):
        summary[f"largest_{key}"] = max((record[key] for record in together), default=None)
    return summary


def measured_records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the steps whose mixes were measured; none of a plain residual."""
    return [record for record in result["records"] if "forward_gain" in record]


def _claims(parts: Parts, variants: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    claims: dict[str, Any] = {}
    if "mhc" in variants:
        gain = _largest(variants["mhc"])
        claims["mhc_gain_at_most_2"] = {"holds": gain <= 2.0, "largest_gain": gain}
    if {"mhc", "hc"} <= variants.keys():
        claims["hc_gain_above_10_times_mhc"] = _gains_apart(variants["hc"], variants["mhc"])
    if {"mhc", "residual"} <= variants.keys():
        claims["mhc_loss_not_above_residual"] = _not_above(parts["mhc"], parts["residual"])
    if {"mhc", "mhc_zero_bias"} <= variants.keys():
        claims["identity_leaning_not_above_zero_bias"] = _not_above(parts["mhc"], parts["mhc_zero_bias"])
    return claims


def _gains_apart(hc: dict[str, Any], mhc: dict[str, Any]) -> dict[str, Any]:
    """HC's gain over the largest that mHC ever has: HC's where training ends, of the seed and the direction
    in which it is smallest (`ratio`, which the claim is about); its largest of all steps as well.
    """
    bound = _largest(mhc)
    ratio = min(*hc["last_forward_gain"], *hc["last_backward_gain"]) / bound
    return {"holds": ratio > 10.0, "ratio": ratio, "largest_ratio": _largest(hc) / bound}


def _largest(variant: dict[str, Any]) -> float:
    return max(float(variant["largest_forward_gain"]), float(variant["largest_backward_gain"]))


def _not_above(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the mean validation loss of `one` is at most the other's, up to the noise of seeds: half of the
    interval that holds the true difference with 95 %, which of few seeds is wide.

    Compared seed by seed: with the same seed two kinds start from the same weights where they have the same
    parameters, and see the same text, so what a seed does to both cancels.
    """
    baselines = {result["seed"]: result["validation_loss"] for result in other}
    gaps = [r["validation_loss"] - baselines[r["seed"]] for r in one if r["seed"] in baselines]
    if len(gaps) < 2:
        difference = statistics.mean(gaps) if gaps else None
        return {"holds": None, "difference": difference, "noise": None, "interval": None}
    difference = statistics.mean(gaps)
    errors = STUDENT[min(len(gaps) - 1, len(STUDENT)) - 1]
    noise = errors * statistics.stdev(gaps) / len(gaps) ** 0.5
    return {
        "holds": difference <= noise,
        "difference": difference,
        "noise": noise,
        "interval": [difference - noise, difference + noise],
        "by_seed": gaps,
        "seeds": len(gaps),
    }
