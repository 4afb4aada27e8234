"""Oracle: the whole model on the whole text; a cache must not change what it says."""

from __future__ import annotations

import pytest
import torch

from mhc_dist.model.decode import Decoder, generate, sample
from tests.unit.export.models import MHC, RESIDUAL, export_config, logits, trained_model


@pytest.mark.parametrize("residual", [RESIDUAL, MHC], ids=["residual", "mhc"])
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 3, 2], [10]])
def test_pieces_of_a_text_say_what_the_whole_says(residual: dict[str, object], pieces: list[int]) -> None:
    """Oracle: LanguageModel without a cache, at the end of every piece."""
    config = export_config(residual)
    model = trained_model(config)
    text = torch.randint(256, (10,), generator=torch.Generator().manual_seed(5))
    expected_LV = logits(model, text[None])[0]
    decoder = Decoder(model, config, capacity=10)
    position = 0
    for piece in pieces:
        said_V = decoder.extend(text[position : position + piece].tolist())
        position += piece
        torch.testing.assert_close(said_V, expected_LV[position - 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="11 tokens are more than the 10"):
        decoder.extend([0])


def test_generation_ends_at_the_end_token_or_the_limit() -> None:
    """Oracle: the same seed without the end token."""
    config = export_config(MHC)
    model = trained_model(config)

    def answer(end: int, max_tokens: int) -> list[int]:
        decoder = Decoder(model, config, capacity=64)
        generator = torch.Generator().manual_seed(1)
        return list(generate(decoder, [0, 65], end, max_tokens, 1.0, generator))

    free = answer(end=-1, max_tokens=12)
    assert len(free) == 12
    end = free[6]
    assert answer(end, 12) == free[: free.index(end)]
    assert answer(-1, 3) == free[:3]


def test_temperature() -> None:
    """Oracle: softmax by hand, within 5 standard deviations of 4000 draws; 0 is the argmax."""
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits_V, 0.0, generator) == 2
    drawn = torch.tensor([sample(logits_V, 2.0, generator) for _ in range(4000)])
    expected = torch.softmax(logits_V / 2.0, 0)
    error = (torch.bincount(drawn, minlength=3) / 4000 - expected).abs()
    assert (error < 5 * (expected * (1 - expected) / 4000).sqrt()).all()
