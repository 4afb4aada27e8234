"""One Transformer layer: an attention sublayer and a feed-forward sublayer, each with its connection."""

from __future__ import annotations

from mhc_kernels.seam import SeamBackend
from torch import nn

from mhc_dist.config import RunConfig
from mhc_dist.model.attention import LatentAttention, LatentCache
from mhc_dist.model.feed_forward import FeedForward
from mhc_dist.model.hyper_connection import Carried, make_connection
from mhc_dist.model.moe import MixtureOfExperts


class Layer(nn.Module):
    """Layer `index` of the whole model. `forward` is the plain, sequential form: the oracle."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        backend: SeamBackend,
        first_expert: int = 0,
        num_local_experts: int | None = None,
    ) -> None:
        super().__init__()
        model = config.model
        self.index = index
        self.attention_connection = make_connection(model, config.residual, 2 * index, backend)
        self.attention = LatentAttention(model)
        self.feed_forward_connection = make_connection(model, config.residual, 2 * index + 1, backend)
        self.feed_forward: FeedForward | MixtureOfExperts
        if is_dense(config, index):
            dense_dim = model.dense_dim if model.dense_dim is not None else 8 * model.expert_dim
            self.feed_forward = FeedForward(model.hidden_size, dense_dim)
        else:
            self.feed_forward = MixtureOfExperts(model, first_expert, num_local_experts)

    def forward(self, carried: Carried, num_sequences: int, cache: LatentCache | None = None) -> Carried:
        """With a cache: the new tokens of the one sequence whose earlier tokens are in the cache."""
        entry = self.attention_connection.enter(*carried)
        y_TC = self.attention(entry.h_TC, num_sequences, cache)
        streams_TNC = self.attention_connection.leave(entry.streams_TNC, y_TC, entry.mix)
        entry = self.feed_forward_connection.enter(streams_TNC, entry.mix.pre_TN)
        y_TC = self.feed_forward(entry.h_TC)
        streams_TNC = self.feed_forward_connection.leave(entry.streams_TNC, y_TC, entry.mix)
        return Carried(streams_TNC, entry.mix.pre_TN)


def is_dense(config: RunConfig, index: int) -> bool:
    """Leading layers have a dense feed-forward, the others a mixture of experts."""
    return index < config.model.num_dense_layers
