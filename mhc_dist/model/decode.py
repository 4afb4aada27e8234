"""Text token by token: the model with a cache, for one sequence on one device.

Of the tokens so far an attention layer keeps what latent attention was made for: the normalised latent and
the rotated key that all heads share, kv_rank + rope_dim numbers a token.

Shapes: L tokens so far, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.model.attention import LatentCache
from mhc_dist.model.language_model import LanguageModel


class Decoder:
    """Reads tokens in pieces and says after each what comes next.

    capacity: the most tokens it will be given.
    """

    def __init__(self, model: LanguageModel, config: RunConfig, capacity: int) -> None:
        self._model = model
        device = model.embedding.weight.device
        self._caches = [LatentCache(config.model, capacity, device) for _ in model.layers]

    @torch.no_grad()
    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Append `tokens`; logits of the token after them, (V,) fp32.

        Raises ValueError for more tokens than the capacity.
        """
        tokens_1T = torch.tensor([list(tokens)], device=self._model.embedding.weight.device)
        streams_TNC = self._model.streams(tokens_1T, self._caches)
        logits_1V = self._model.head.logits(streams_TNC[-1:].contiguous())
        return logits_1V[0]


def sample(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token from softmax(logits / temperature); temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return int(logits_V.argmax())
    probability_V = torch.softmax(logits_V.double() / temperature, dim=0)
    return int(torch.multinomial(probability_V, 1, generator=generator))


def generate(
    decoder: Decoder,
    prompt: Sequence[int],
    end: int,
    max_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """The tokens after `prompt`, one at a time, until `end` (not yielded) or `max_tokens` of them."""
    logits_V = decoder.extend(prompt)
    for left in range(max_tokens, 0, -1):
        token = sample(logits_V, temperature, generator)
        if token == end:
            return
        yield token
        if left > 1:
            logits_V = decoder.extend([token])
