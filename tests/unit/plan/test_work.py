"""What parts of the model do and move, as the planner counts it, against the model's own operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mhc_dist.config import RunConfig, load_config
from mhc_dist.model.attention import causal_attention
from mhc_dist.model.hyper_connection import StreamHead
from mhc_dist.model.moe import Router
from mhc_dist.plan.connection_rows import connection_work
from mhc_dist.plan.work import (
    attention_work,
    embedding_gradient_bytes,
    experts_work,
    gathering_work,
    head_work,
    product,
    routing_work,
    shared_work,
)

CONFIGS = Path(__file__).parents[3] / "configs"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VIEWS = {"alias", "detach", "expand", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view"}
GATHERS = {"nll_loss_forward", "nll_loss_backward", "embedding_dense_backward"}
"""Of a large argument they read a value or a row for each token."""


class Moved(TorchDispatchMode):
    """Bytes that torch's operations read and write, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.products: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in VIEWS:
            return result
        moved = tree_iter(result) if name in GATHERS else tree_iter((args, kwargs, result))
        for tensor in moved:
            if isinstance(tensor, Tensor):
                self.num_bytes += min(
                    tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
                )
        if name == "mm":
            self.products.append((args[0].dtype, 2 * args[0].numel() * args[1].shape[1]))
        return result


def config_of(*overrides: str) -> RunConfig:
    return load_config(CONFIGS / "paper_27b.yaml", list(overrides))


def test_attention_works_at_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the shapes that `causal_attention` gives to torch: two products of them, half of it visible."""
    config = config_of()
    m, length = config.model, config.data.sequence_length
    operations = 0

    def attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLV: Tensor, **_: Any) -> Tensor:
        nonlocal operations
        heads, rows = q_BHLD.shape[1], q_BHLD.shape[2]
        operations = 2 * heads * rows * rows * (k_BHLD.shape[3] + v_BHLV.shape[3]) // 2
        return v_BHLV

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    key = torch.empty(1, m.num_heads, length, m.head_dim + m.rope_dim, device="meta")
    causal_attention(key, key, torch.empty(1, m.num_heads, length, m.value_dim, device="meta"))
    assert attention_work(config).scores == operations / length


def test_values_moved_by_hand() -> None:
    """Oracle: by hand, for 32 heads of 128 + 64 and 128 filled up to 192. A copy's backward moves as much as
    the copy; sums of gradients that meet read two and write one; the activation's backward reads three of
    1536 and writes two; answers are read for the gradient of their weights.
    """
    config = config_of()
    row, active, inner = 2560, 6 * 2560, 1536
    turned = 32 * (2 * 192 + (128 + 192) + (128 + 192) + 2 * 128) + 64
    expected = {
        attention_work: (turned + 2 * 512, turned + 3 * 512 + 3 * row),
        routing_work: (row + active, active + row + 2 * 3 * row),
        shared_work: (3 * 2 * inner, 5 * 2 * inner),
        experts_work: (4 * active + 6 * 3 * inner, 4 * active + 6 * 5 * inner),
        gathering_work: (active + row + 3 * row, row + 2 * active),
    }
    for work, (forward, backward) in expected.items():
        assert (work(config).values, work(config).values_backward) == (forward, backward), work.__name__
    assert product(row, 7).crossing == row + 7
    assert experts_work(config).crossing == 6 * (row + 2 * inner + inner + row)


@pytest.mark.parametrize("precision", DTYPES)
def test_loss_moves_what_torch_moves(precision: str) -> None:
    """Oracle: bytes counted of torch's operations; what is moved per token and not per logit is left out."""
    config, dtype = config_of(f"train.precision={precision}"), DTYPES[precision]
    tokens, vocabulary = 16, 4096
    logits_TV = torch.zeros(tokens, vocabulary, dtype=dtype, requires_grad=True)
    with Moved() as forward:
        loss = functional.cross_entropy(logits_TV.float(), torch.zeros(tokens, dtype=torch.int64))
    with Moved() as backward:
        loss.backward()
    work, unit = head_work(config), tokens * vocabulary * dtype.itemsize / config.model.vocab_size
    assert forward.num_bytes == pytest.approx(work.values * unit, rel=2e-3)
    assert backward.num_bytes == pytest.approx(work.values_backward * unit, rel=2e-3)


@pytest.mark.parametrize("precision", DTYPES)
def test_embedding_gradient_moves_all_rows(precision: str) -> None:
    """Oracle: bytes counted of torch's operations for one token: its gradient is as large as the embedding,
    and is added to an fp32 sum.
    """
    config, dtype = config_of(f"train.precision={precision}"), DTYPES[precision]
    weight_VC = torch.zeros(512, 64, dtype=dtype, requires_grad=True)
    embedded_TC = functional.embedding(torch.zeros(1, dtype=torch.int64), weight_VC)
    gradient_TC, sum_VC = torch.ones_like(embedded_TC), torch.zeros(512, 64)
    with Moved() as moved:
        embedded_TC.backward(gradient_TC)
        assert weight_VC.grad is not None
        sum_VC.add_(weight_VC.grad)
    share = weight_VC.numel() / (config.model.vocab_size * config.model.hidden_size)
    assert moved.num_bytes == pytest.approx(embedding_gradient_bytes(config) * share, rel=5e-3)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("num_streams", [2, 4])
def test_the_head_moves_streams_operation_by_operation(precision: str, num_streams: int) -> None:
    """Oracle: bytes counted of the head's operations on streams; the norm after them counts as one pass."""
    dtype = DTYPES[precision]
    config = config_of(
        f"train.precision={precision}", f"residual.num_streams={num_streams}", "model.hidden_size=512"
    )
    head = StreamHead(config.model, config.residual)
    head.norm = nn.Identity()  # type: ignore[assignment]
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    streams_TNC = torch.zeros(256, num_streams, 512, dtype=dtype, requires_grad=True)
    with Moved() as forward:
        u_TC = head(streams_TNC)
    gradient_TC = torch.ones_like(u_TC)
    with Moved() as backward:
        u_TC.backward(gradient_TC)
    work, row = connection_work(config), 256 * 512 * dtype.itemsize
    # Numbers for each token, and the projection's weights, are small beside a row, but not nothing.
    assert forward.num_bytes / row == pytest.approx(work.collapse - 2, rel=0.03)
    assert backward.num_bytes / row == pytest.approx(work.collapse_backward - 3, rel=0.03)


def test_the_router_multiplies_in_fp32() -> None:
    """Oracle: the products that a router runs for bf16 tokens."""
    config = config_of("model.hidden_size=64", "model.num_experts=8", "parallel.expert=8")
    router = Router(config.model)
    nn.init.zeros_(router.weight)
    with Moved() as moved:
        router(torch.zeros(16, 64, dtype=torch.bfloat16))
    assert moved.products == [(torch.float32, 16 * routing_work(config).exact)]
