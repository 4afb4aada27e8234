"""Oracle: latent attention written out, with a mask and a softmax and complex rotations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from mhc_dist.model.attention import LatentAttention, causal_attention, rotary_angles, rotate
from mhc_dist.model.initialize import initialize
from tests.small import small_config

CONFIG = small_config()


def plain(attention: LatentAttention, h_BLC: torch.Tensor) -> torch.Tensor:
    c = CONFIG.model
    batch, length, _ = h_BLC.shape
    positions = torch.arange(length, dtype=torch.float64)
    frequencies = c.rope_theta ** (-torch.arange(0, c.rope_dim, 2, dtype=torch.float64) / c.rope_dim)
    turn = torch.polar(
        torch.ones(length, c.rope_dim // 2, dtype=torch.float64), positions[:, None] * frequencies
    )

    def rope(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).float()

    query = (h_BLC @ attention.query.weight.t()).view(batch, length, c.num_heads, -1)
    latent = h_BLC @ attention.latent.weight.t()
    key_rope = rope(latent[..., c.kv_rank :])
    compressed = latent[..., : c.kv_rank]
    rms = torch.sqrt(compressed.square().mean(-1, keepdim=True) + c.norm_eps)
    compressed = compressed / rms * attention.latent_norm.gain
    key_value = (compressed @ attention.key_value.weight.t()).view(batch, length, c.num_heads, -1)
    heads = []
    for head in range(c.num_heads):
        q = torch.cat((query[:, :, head, : c.head_dim], rope(query[:, :, head, c.head_dim :])), -1)
        k = torch.cat((key_value[:, :, head, : c.head_dim], key_rope), -1)
        v = key_value[:, :, head, c.head_dim :]
        scores = q @ k.transpose(1, 2) / math.sqrt(c.head_dim + c.rope_dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1) @ attention.output.weight.t()


def test_latent_attention_equals_the_plain_form() -> None:
    torch.manual_seed(0)
    attention = LatentAttention(CONFIG.model)
    initialize(attention, CONFIG)
    h = torch.randn(3, 7, CONFIG.model.hidden_size)
    results = []
    for function in (lambda x: attention(x.flatten(0, 1), 3).view(3, 7, -1), lambda x: plain(attention, x)):
        attention.zero_grad()
        x = h.clone().requires_grad_()
        y = function(x)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        results.append((y.detach(), x.grad, {name: p.grad for name, p in attention.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
    for name, want in results[1][2].items():
        torch.testing.assert_close(results[0][2][name], want, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("qk_dim", "value_dim", "narrow"), [(12, 12, 0), (16, 8, 1), (8, 16, 2)])
def test_padding_changes_nothing(
    qk_dim: int, value_dim: int, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: torch's attention without padding; only what is too narrow is copied."""
    pad, copied = functional.pad, []

    def counted(x: torch.Tensor, missing: tuple[int, int]) -> torch.Tensor:
        copied.append(x)
        return pad(x, missing)

    monkeypatch.setattr(functional, "pad", counted)
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, qk_dim)
    v = torch.randn(2, 3, 9, value_dim)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), want)
    assert len(copied) == narrow


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    """Oracle: the two properties that define rotary positions."""
    torch.manual_seed(0)
    cos, sin = rotary_angles(20, 8, 1e4, torch.device("cpu"))
    q, k = torch.randn(2, 8)
    turned_q = rotate(q.expand(1, 20, 1, 8), cos, sin)[0, :, 0]
    turned_k = rotate(k.expand(1, 20, 1, 8), cos, sin)[0, :, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))
    torch.testing.assert_close(turned_q[5] @ turned_k[2], turned_q[15] @ turned_k[12], rtol=1e-4, atol=1e-5)
