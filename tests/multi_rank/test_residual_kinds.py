"""Oracle: the single-device model, for the kinds of residual that are options, and H_pre carried along."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhc_dist.config import RunConfig
from mhc_dist.model.hyper_connection import Carried
from mhc_dist.parallel.boundary import message_shape, pack, unpack
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.pipeline_case import merge, oracle_gradients, rank_gradients
from tests.multi_rank.test_pipeline_parity import check
from tests.small import small_config

MHC_LITE = {"kind": "mhc_lite"}
KROM = {"kind": "krom", "num_streams": 8}
SHIFTED = {"kind": "mhc", "shifted_pre": True}
SHIFTED_LITE = {"kind": "mhc_lite", "shifted_pre": True}


def kind_config(
    residual: dict[str, Any],
    topology: tuple[int, int, int],
    schedule: str,
    recompute: str = "none",
) -> RunConfig:
    pipeline, data, expert = topology
    return small_config(
        model={"num_layers": 5, "num_dense_layers": 2},
        residual={"num_streams": 4, **residual},
        parallel={"pipeline": pipeline, "data": data, "expert": expert},
        schedule={"name": schedule, "num_microbatches": 4},
        recompute={"mode": recompute},
    )


@pytest.mark.parametrize(
    ("residual", "topology", "schedule", "recompute"),
    [
        (MHC_LITE, (2, 2, 2), "dualpipev", "none"),
        (MHC_LITE, (1, 2, 2), "dualpipev", "mhc"),
        (KROM, (2, 2, 2), "dualpipev", "none"),
        (KROM, (2, 1, 1), "1f1b", "mhc"),
        (SHIFTED, (2, 2, 2), "dualpipev", "none"),
        (SHIFTED, (2, 1, 1), "dualpipev", "mhc"),
        (SHIFTED, (2, 1, 1), "1f1b", "full"),
        (SHIFTED_LITE, (2, 2, 2), "zbv", "mhc"),
    ],
)
def test_gradients_equal_single_device(
    residual: dict[str, Any], topology: tuple[int, int, int], schedule: str, recompute: str
) -> None:
    """Oracle: loss and gradients of the single-device model; recompute leaves them bit-equal."""
    config = kind_config(residual, topology, schedule, recompute)
    got = merge(config, run_ranks(config.num_processes, rank_gradients, config))
    check(got, oracle_gradients(config))
    if recompute != "none":
        plain = kind_config(residual, topology, schedule)
        kept = merge(plain, run_ranks(plain.num_processes, rank_gradients, plain))
        for name, gradient in kept.by_name.items():
            assert torch.equal(got.by_name[name], gradient), name


def test_shifted_pre_is_another_model() -> None:
    """Oracle: the same weights without the option: its loss differs, so the tests above see it."""
    shifted = oracle_gradients(kind_config(SHIFTED, (1, 1, 1), "dualpipev"))
    own = oracle_gradients(kind_config({"kind": "mhc"}, (1, 1, 1), "dualpipev"))
    assert abs(shifted.loss - own.loss) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_messages_carry_every_bit_both_ways(dtype: torch.dtype) -> None:
    """Oracle: the tensors that were packed, and for gradients those that were handed in."""
    config = kind_config(SHIFTED, (2, 1, 1), "1f1b")
    generator = torch.Generator().manual_seed(0)
    shape = message_shape(config, dtype)
    num_tokens, n, width = shape[0], shape[1], config.model.hidden_size
    streams_TNC = torch.randn(num_tokens, n, width, generator=generator).to(dtype).requires_grad_()
    pre_TN = torch.randn(num_tokens, n, generator=generator).requires_grad_()
    message = pack(Carried(streams_TNC, pre_TN))
    assert tuple(message.shape) == shape
    assert message.dtype == dtype
    received = message.detach().requires_grad_()
    back = unpack(received, config)
    assert back.pre_TN is not None
    assert torch.equal(back.streams_TNC, streams_TNC)
    assert torch.equal(back.pre_TN, pre_TN)
    d_streams_TNC = torch.randn(num_tokens, n, width, generator=generator).to(dtype)
    d_pre_TN = torch.randn(num_tokens, n, generator=generator) * 1e-20
    torch.autograd.backward([back.streams_TNC, back.pre_TN], [d_streams_TNC, d_pre_TN])
    assert received.grad is not None
    message.backward(received.grad)
    assert streams_TNC.grad is not None
    assert pre_TN.grad is not None
    assert torch.equal(streams_TNC.grad, d_streams_TNC)
    assert torch.equal(pre_TN.grad, d_pre_TN)
