"""Multi-head latent attention (DeepSeek-V2/V3) without query compression.

Shapes: B sequences, L positions, H heads, T = B * L tokens, C hidden size, K = head_dim, R = rope_dim,
V = value_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mhc_dist.config_sections import ModelConfig
from mhc_dist.model.linear import Linear
from mhc_dist.model.norm import RMSNorm


def rotary_angles(length: int, rope_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / rope_dim), each (length, rope_dim / 2) fp32."""
    frequency = theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64, device=device) / rope_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x_BLHR: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Rotate consecutive pairs (x_2i, x_2i+1) by their position's angle; dtype kept."""
    even, odd = x_BLHR.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_LR[:, None, :], sin_LR[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BLHR.dtype)


def causal_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLV: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D), causal) v, through torch's fused kernels; (B, H, L, V).

    Those want one width for all three; otherwise torch writes the scores of whole sequences to memory. So the
    narrower side is filled up with zeros, which change nothing.
    """
    qk_dim, value_dim = q_BHLD.shape[-1], v_BHLV.shape[-1]
    width = max(qk_dim, value_dim)
    q, k, v = (_filled_up(x, width) for x in (q_BHLD, k_BHLD, v_BHLV))
    o = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=qk_dim**-0.5)
    return o[..., :value_dim]


def _filled_up(x_BHLD: Tensor, width: int) -> Tensor:
    """With zeros behind; as it is where it is that wide already, which torch's own `pad` would copy."""
    missing = width - x_BHLD.shape[-1]
    return functional.pad(x_BHLD, (0, missing)) if missing else x_BHLD


class LatentCache:
    """What attention of one layer needs of the tokens so far: normalised latents and rotated keys."""

    def __init__(self, config: ModelConfig, capacity: int, device: torch.device) -> None:
        self._latent = torch.empty(capacity, config.kv_rank, device=device)
        self._key = torch.empty(capacity, config.rope_dim, device=device)
        self.length = 0

    def append(self, latent_TK: Tensor, key_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Everything so far, the new tokens included: latents (L, kv_rank) and keys (L, R).

        Raises ValueError when it is full.
        """
        end = self.length + latent_TK.shape[0]
        if end > self._latent.shape[0]:
            raise ValueError(f"{end} tokens are more than the {self._latent.shape[0]} the cache was made for")
        self._latent[self.length : end] = latent_TK
        self._key[self.length : end] = key_TR
        self.length = end
        return self._latent[:end], self._key[:end]


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are expanded from a kv_rank-wide latent per token.

    Queries and keys are [head_dim without position | rope_dim with RoPE]; the RoPE key is shared by heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_heads
        self.query = Linear(width, heads * (config.head_dim + config.rope_dim))
        self.latent = Linear(width, config.kv_rank + config.rope_dim)
        self.latent_norm = RMSNorm(config.kv_rank, config.norm_eps)
        self.key_value = Linear(config.kv_rank, heads * (config.head_dim + config.value_dim))
        self.output = Linear(heads * config.value_dim, width)

    def forward(self, h_TC: Tensor, num_sequences: int, cache: LatentCache | None = None) -> Tensor:
        """h_TC holds `num_sequences` sequences of equal length one after the other; returns (T, C).

        With a cache it holds new tokens of the one sequence whose earlier tokens are in the cache.
        """
        if cache is not None:
            assert num_sequences == 1, "a cache holds one sequence"
            return self._continue(h_TC, cache)
        c = self.config
        h_BLC = h_TC.unflatten(0, (num_sequences, -1))
        length = h_BLC.shape[1]
        cos, sin = rotary_angles(length, c.rope_dim, c.rope_theta, h_TC.device)

        query = self.query(h_BLC).unflatten(-1, (c.num_heads, c.head_dim + c.rope_dim))
        query_plain, query_rope = query.split((c.head_dim, c.rope_dim), dim=-1)
        latent, key_rope = self.latent(h_BLC).split((c.kv_rank, c.rope_dim), dim=-1)
        key_value = self.key_value(self.latent_norm(latent)).unflatten(-1, (c.num_heads, -1))
        key_plain, value = key_value.split((c.head_dim, c.value_dim), dim=-1)

        query_rope = rotate(query_rope, cos, sin)
        key_rope = rotate(key_rope.unsqueeze(2), cos, sin).expand(-1, -1, c.num_heads, -1)
        q_BHLD = torch.cat((query_plain, query_rope), dim=-1).transpose(1, 2)
        k_BHLD = torch.cat((key_plain, key_rope), dim=-1).transpose(1, 2)
        o_BHLV = causal_attention(q_BHLD, k_BHLD, value.transpose(1, 2))
        y_BLC: Tensor = self.output(o_BHLV.transpose(1, 2).flatten(2))
        return y_BLC.flatten(0, 1)

    def _continue(self, h_TC: Tensor, cache: LatentCache) -> Tensor:
        """Attention of new tokens to those so far, in the latent's space: keys and values of old tokens are
        never expanded. q . (W_k c) = (W_k^T q) . c, and the sum of p_l W_v c_l is W_v (sum of p_l c_l).
        """
        c, first = self.config, cache.length
        num_tokens = h_TC.shape[0]
        cos, sin = rotary_angles(first + num_tokens, c.rope_dim, c.rope_theta, h_TC.device)
        cos, sin = cos[first:], sin[first:]
        query_THD = self.query(h_TC).unflatten(-1, (c.num_heads, -1))
        query_plain, query_rope = query_THD.split((c.head_dim, c.rope_dim), dim=-1)
        latent, key_rope = self.latent(h_TC).split((c.kv_rank, c.rope_dim), dim=-1)
        rotated_TR = rotate(key_rope[None, :, None], cos, sin)[0, :, 0]
        latent_LK, key_LR = cache.append(self.latent_norm(latent), rotated_TR)

        weight_HEK = self.key_value.weight.unflatten(0, (c.num_heads, -1))
        to_key, to_value = weight_HEK.split((c.head_dim, c.value_dim), dim=1)
        query_THK = torch.einsum("thd,hdk->thk", query_plain, to_key)
        score_HTL = torch.einsum("thk,lk->htl", query_THK, latent_LK)
        score_HTL += torch.einsum("thr,lr->htl", rotate(query_rope[None], cos, sin)[0], key_LR)
        position_L = torch.arange(first + num_tokens, device=h_TC.device)
        later_TL = position_L > position_L[first:, None]
        score_HTL = (score_HTL * (c.head_dim + c.rope_dim) ** -0.5).masked_fill(later_TL, float("-inf"))
        mean_THK = torch.einsum("htl,lk->thk", score_HTL.softmax(-1), latent_LK)
        o_THV = torch.einsum("thk,hvk->thv", mean_THK, to_value)
        y_TC: Tensor = self.output(o_THV.flatten(1))
        return y_TC
