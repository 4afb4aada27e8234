"""Token movement against plain indexing under autograd."""

from __future__ import annotations

import pytest
import torch
from mhc_kernels import tokens


def choices(num_tokens: int, num_choices: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack(
        [torch.randperm(num_experts, generator=generator)[:num_choices] for _ in range(num_tokens)]
    )


def test_order_sorts_by_expert_and_keeps_tokens_in_order() -> None:
    """Oracle: Python's stable sort of (expert, token) pairs."""
    expert_TK = choices(40, 3, 8)
    order = tokens.order_by_expert(expert_TK, 8)
    pairs = sorted((int(e), t, k) for t, row in enumerate(expert_TK) for k, e in enumerate(row))
    assert order.token_R.tolist() == [t for _, t, _ in pairs]
    assert [order.place_TK[t, k].item() for _, t, k in pairs] == list(range(120))
    assert order.rows_per_expert_E.tolist() == [sum(e == x for e, _, _ in pairs) for x in range(8)]
    assert (
        tokens.order_by_expert(torch.zeros(0, 3, dtype=torch.int64), 8).rows_per_expert_E.tolist() == [0] * 8
    )


def test_permute_and_unpermute_have_exact_gradients() -> None:
    """Oracle: finite differences in fp64, over several blocks of rows."""
    order = tokens.order_by_expert(choices(20, 3, 8), 8)
    x_TC = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(20, 3, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return tokens.unpermute(tokens.permute(x, order).sin(), weight, order)

    assert torch.autograd.gradcheck(through, (x_TC, weight_TK))


@pytest.mark.parametrize("num_tokens", [1, 200])
def test_unpermute_equals_index_add(num_tokens: int) -> None:
    """Oracle: torch's index_add under autograd."""
    order = tokens.order_by_expert(choices(num_tokens, 4, 16), 16)
    rows_RC = torch.randn(num_tokens * 4, 32, requires_grad=True)
    weight_TK = torch.rand(num_tokens, 4, requires_grad=True)
    weight_R = torch.empty(num_tokens * 4).index_put((order.place_TK.flatten(),), weight_TK.flatten())
    theirs = torch.zeros(num_tokens, 32).index_add(0, order.token_R, rows_RC * weight_R.unsqueeze(1))
    ours = tokens.unpermute(rows_RC, weight_TK, order)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (rows_RC, weight_TK)),
        torch.autograd.grad(theirs.square().sum(), (rows_RC, weight_TK)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_grouped_matmul_equals_a_loop_over_experts() -> None:
    """Oracle: one matrix product per expert; one expert has no rows."""
    counts = torch.tensor([5, 0, 3, 8])
    rows_RC, weight_ECD = torch.randn(16, 32, requires_grad=True), torch.randn(4, 32, 16, requires_grad=True)
    ours = tokens.grouped_matmul(rows_RC, weight_ECD, counts)
    parts = rows_RC.split(counts.tolist())
    theirs = torch.cat([part @ weight for part, weight in zip(parts, weight_ECD, strict=True)])
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (rows_RC, weight_ECD)),
        torch.autograd.grad(theirs.square().sum(), (rows_RC, weight_ECD)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_bad_arguments_are_refused_by_name() -> None:
    """Oracle: the contract; the error names the argument and what is needed."""
    order = tokens.order_by_expert(choices(4, 2, 8), 8)
    with pytest.raises(ValueError, match=r"expert_TK has shape \(4,\)"):
        tokens.order_by_expert(torch.zeros(4, dtype=torch.int64), 8)
    for named in (9, -1):
        with pytest.raises(ValueError, match=rf"names expert {named}: with num_experts=8 0 to 7 exist"):
            tokens.order_by_expert(torch.full((2, 2), named), 8)
    with pytest.raises(ValueError, match=r"rows_RC has shape \(4, 8\): \(8, channels\)"):
        tokens.unpermute(torch.zeros(4, 8), torch.zeros(4, 2), order)
    with pytest.raises(ValueError, match=r"gate_up has shape \(4, 7\)"):
        tokens.swiglu(torch.zeros(4, 7))


def test_companions_of_other_kinds_are_refused_by_name() -> None:
    """Oracle: the contract: dtype, device and the sizes that belong together."""
    order = tokens.order_by_expert(choices(4, 2, 8), 8)
    rows_RC, weight_TK = torch.zeros(8, 16), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"x_TC has dtype torch\.int64: a floating dtype"):
        tokens.permute(torch.zeros(4, 16, dtype=torch.int64), order)
    with pytest.raises(ValueError, match=r"x_TC is on meta, order on cpu: one device"):
        tokens.permute(torch.zeros(4, 16, device="meta"), order)
    with pytest.raises(ValueError, match=r"weight_TK has dtype torch\.int64"):
        tokens.unpermute(rows_RC, weight_TK.long(), order)
    with pytest.raises(ValueError, match=r"weight_TK is on meta, rows_RC on cpu"):
        tokens.unpermute(rows_RC, weight_TK.to("meta"), order)
    counts_E, bank_ECD = order.rows_per_expert_E, torch.zeros(8, 16, 32)
    with pytest.raises(ValueError, match=r"weight_ECD \(8, 32, 16\): \(rows, channels\)"):
        tokens.grouped_matmul(rows_RC, bank_ECD.transpose(1, 2), counts_E)
    with pytest.raises(ValueError, match=r"rows_per_expert_E has shape \(7,\): one number for each of the 8"):
        tokens.grouped_matmul(rows_RC, bank_ECD, counts_E[:7])
    with pytest.raises(ValueError, match=r"weight_ECD has dtype torch\.bfloat16: that of rows_RC"):
        tokens.grouped_matmul(rows_RC, bank_ECD.bfloat16(), counts_E)
