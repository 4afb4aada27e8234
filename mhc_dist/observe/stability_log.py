"""`stability/stage_P.jsonl`: what each pipeline stage measured of its mixes. Imports no torch.

Two lines for every measured step:

    {"kind": "layers", "step": ..., "stage": ...,
     "sublayers": [{"sublayer": 0, "forward_gain": ..., "pre": [mean, std, smallest, largest], ...}, ...]}
    {"kind": "composite", "step": ..., "stage": ..., "forward_gain": ..., "backward_gain": ...,
     "row_residual": ..., "column_residual": ..., "chunks": [{"chunk": 0, "product": [...]}, ...]}

`product` is the product of a chunk's mixes for each sampled token. All stages sample the same tokens of the
same microbatch, so the product over all chunks, in order, is the whole model's: `composite_gains`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhc_dist.observe import whole_lines

if TYPE_CHECKING:
    from mhc_dist.observe.stability import StageFigures

FOLDER = "stability"
DIGITS = 7
"""Significant digits written: what fp32 has."""


class StabilityLog:
    """Appends a stage's figures; what an earlier process wrote beyond `last_step` is cut."""

    def __init__(self, run: Path, stage: int, last_step: int = 0) -> None:
        self._path, self._stage = run / FOLDER / f"stage_{stage}.jsonl", stage
        if self._path.exists():
            kept = [line for line in _lines(self._path) if line["step"] <= last_step]
            whole_lines.replace(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, figures: StageFigures) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = stage_lines(step, self._stage, figures)
        whole_lines.append_to(self._path, "".join(json.dumps(line) + "\n" for line in lines))


def stage_lines(step: int, stage: int, figures: StageFigures) -> list[dict[str, Any]]:
    """A step's two lines."""
    sublayers = [
        {
            "sublayer": one.sublayer,
            "forward_gain": _short(one.gain.forward),
            "backward_gain": _short(one.gain.backward),
            "row_residual": _short(one.residual.rows),
            "column_residual": _short(one.residual.columns),
            "pre": _short([one.pre.mean, one.pre.std, one.pre.smallest, one.pre.largest]),
            "post": _short([one.post.mean, one.post.std, one.post.smallest, one.post.largest]),
            "stream_rms": _short(one.stream_rms),
        }
        for chunk in figures.chunks
        for one in chunk.sublayers
    ]
    whole = {
        "forward_gain": _short(figures.gain.forward),
        "backward_gain": _short(figures.gain.backward),
        "row_residual": _short(figures.residual.rows),
        "column_residual": _short(figures.residual.columns),
        "chunks": [{"chunk": chunk.chunk, "product": _short(chunk.product)} for chunk in figures.chunks],
    }
    return [
        {"kind": "layers", "step": step, "stage": stage, "sublayers": sublayers},
        {"kind": "composite", "step": step, "stage": stage, **whole},
    ]


def composite_gains(lines: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """direction -> step -> Amax gain of the whole model, for steps that every stage has recorded.

    Exact where stages wrote their products; otherwise the product of the stages' gains, which bounds it.
    """
    composites = [line for line in lines if line.get("kind") == "composite"]
    stages = {line["stage"] for line in composites}
    by_step: dict[int, dict[int, dict[str, Any]]] = {}
    for line in composites:
        by_step.setdefault(line["step"], {})[line["stage"]] = line
    found: dict[str, dict[int, float]] = {"forward": {}, "backward": {}}
    for step, of_stage in by_step.items():
        if of_stage.keys() != stages:
            continue
        product_SNN = _whole_product(list(of_stage.values()))
        if product_SNN is None:
            for direction, gains in found.items():
                gains[step] = float(np.prod([line[f"{direction}_gain"] for line in of_stage.values()]))
        else:
            found["forward"][step] = float(np.abs(product_SNN.sum(2)).max(1).mean())
            found["backward"][step] = float(np.abs(product_SNN.sum(1)).max(1).mean())
    return found


def _whole_product(stages: Sequence[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """(S, n, n) over all chunks of all stages; None unless all stages wrote theirs, each chunk once."""
    products = {chunk["chunk"]: chunk["product"] for line in stages for chunk in line.get("chunks", ())}
    if not products or sorted(products) != list(range(len(products))):
        return None
    whole = np.array(products[0], dtype=np.float64)
    for chunk in range(1, len(products)):
        whole = np.array(products[chunk], dtype=np.float64) @ whole
    return whole


def _short(value: Any) -> Any:
    """Numbers with as many digits as they have."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.{DIGITS}g}")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Complete lines. A process that was killed leaves half a line, which is dropped."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
