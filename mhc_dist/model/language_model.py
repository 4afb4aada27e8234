"""The whole language model on one device: tokens in, mean loss out. The oracle of all tests.

Shapes: B sequences, L positions, T = B * L tokens, n streams (N), C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mhc_kernels.seam import SeamBackend
from torch import Tensor, nn
from torch.nn import functional

from mhc_dist.config import RunConfig
from mhc_dist.model.attention import LatentCache
from mhc_dist.model.hyper_connection import Carried, StreamHead, expand
from mhc_dist.model.layer import Layer
from mhc_dist.model.linear import Linear


class Embedding(nn.Module):
    """Token embedding and expansion to n identical streams: (B, L) int64 -> (T, n, C)."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.num_streams = config.residual.num_streams
        self.weight = nn.Parameter(torch.empty(config.model.vocab_size, config.model.hidden_size))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return expand(functional.embedding(tokens_BL.flatten(), self.weight), self.num_streams)


class Head(nn.Module):
    """Streams to the mean next-token cross-entropy, in nats, computed in fp32."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.streams = StreamHead(config.model, config.residual)
        self.output = Linear(config.model.hidden_size, config.model.vocab_size)

    def logits(self, streams_TNC: Tensor) -> Tensor:
        """(T, V), fp32."""
        logits_TV: Tensor = self.output(self.streams(streams_TNC))
        return logits_TV.float()

    def forward(self, streams_TNC: Tensor, targets_BL: Tensor) -> Tensor:
        return functional.cross_entropy(self.logits(streams_TNC), targets_BL.flatten())


class LanguageModel(nn.Module):
    """Embedding, all layers with all experts, head."""

    def __init__(self, config: RunConfig, backend: SeamBackend) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, index, backend) for index in range(config.model.num_layers))
        self.head = Head(config)

    def streams(self, tokens_BL: Tensor, caches: Sequence[LatentCache] | None = None) -> Tensor:
        """The streams after the last layer, (T, n, C).

        caches: one a layer; `tokens_BL` are then new tokens of the one sequence they hold.
        """
        carried = Carried(self.embedding(tokens_BL))
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            carried = layer(carried, tokens_BL.shape[0], cache)
        return carried.streams_TNC

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean loss over the B * L tokens, in nats per token."""
        loss: Tensor = self.head(self.streams(tokens_BL), targets_BL)
        return loss
