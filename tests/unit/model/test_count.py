"""Oracle: the model itself, built without memory on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mhc_kernels.seam import make_backend

from mhc_dist.config import RunConfig, load_config
from mhc_dist.model.count import count_parameters
from mhc_dist.model.language_model import LanguageModel

CONFIGS = Path(__file__).parents[3] / "configs"


def built(config: RunConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config, make_backend("reference"))


@pytest.mark.parametrize("name", ["tiny", "paper_3b", "paper_27b"])
@pytest.mark.parametrize("kind", ["residual", "hc", "mhc", "identity", "mhc_lite", "krom"])
def test_count_equals_the_model(name: str, kind: str) -> None:
    streams = {"residual": 1, "krom": 8}.get(kind, 4)
    config = load_config(
        CONFIGS / f"{name}.yaml",
        [f"residual.kind={kind}", f"residual.num_streams={streams}", "kernels.backend=cpu"],
    )
    model = built(config)
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.vocab == model.embedding.weight.numel() + model.head.output.weight.numel()
