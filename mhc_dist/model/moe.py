"""DeepSeekMoE: a sigmoid gate with loss-free balancing, routed experts and shared experts.

Shapes: T tokens, C hidden size, E routed experts, K active experts per token, F expert width, R rows
(a row is one token on its way to one expert, so T * K rows leave a rank).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from mhc_kernels import tokens
from torch import Tensor, nn

from mhc_dist.config_sections import ModelConfig
from mhc_dist.model.feed_forward import FeedForward, swiglu
from mhc_dist.model.linear import GroupedLinear


class Routing(NamedTuple):
    """Where each token goes: expert ids (T, K) int64 and their weights (T, K) fp32, summing to gate_scale."""

    expert_TK: Tensor
    weight_TK: Tensor


class Router(nn.Module):
    """Scores are sigmoids; the K best by score + bias are taken, weighted by their scores alone.

    The bias balances the load without a loss term (arXiv:2408.15664): after every step it rises for experts
    below the mean load and falls for those above. It is no parameter: no gradient reaches it.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_active = config.num_active_experts
        self.gate_scale = config.gate_scale
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("bias_E", torch.zeros(config.num_experts, dtype=torch.float32))
        self.register_buffer("load_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, h_TC: Tensor) -> Routing:
        score_TE = torch.sigmoid(h_TC.float() @ self.weight.float().t())
        expert_TK = torch.topk(score_TE.detach() + self.bias_E, self.num_active, dim=-1).indices
        picked_TK = score_TE.gather(1, expert_TK)
        # Sigmoids can all underflow to 0 on extreme logits; the floor keeps the quotient finite.
        weight_TK = picked_TK / picked_TK.sum(-1, keepdim=True).clamp_min(1e-20) * self.gate_scale
        if torch.is_grad_enabled():  # evaluation does not count towards the training load
            self.load_E += count_rows(expert_TK.flatten(), self.load_E.numel())
        return Routing(expert_TK, weight_TK)

    @torch.no_grad()
    def balance(self, load_E: Tensor, rate: float) -> None:
        """Move the bias by `rate` against the load of the whole global batch; start counting anew."""
        load = load_E.double()
        self.bias_E += (rate * torch.sign(load.mean() - load)).float()
        self.load_E.zero_()


class Experts(nn.Module):
    """The routed experts held here, `num_experts` of them, starting with expert `first_expert`."""

    def __init__(self, config: ModelConfig, first_expert: int, num_experts: int) -> None:
        super().__init__()
        self.first_expert, self.num_experts = first_expert, num_experts
        self.gate_up = GroupedLinear(num_experts, config.hidden_size, 2 * config.expert_dim)
        self.down = GroupedLinear(num_experts, config.expert_dim, config.hidden_size)
        for parameter in self.parameters():
            parameter.is_expert = True  # type: ignore[attr-defined]

    def forward(self, rows_RC: Tensor, counts: list[int]) -> Tensor:
        """Rows sorted by expert, counts[e] of them for local expert e; returns rows in the same order."""
        y_RC: Tensor = self.down(swiglu(self.gate_up(rows_RC, counts)), counts)
        return y_RC


class MixtureOfExperts(nn.Module):
    """Router, routed experts (all, or one rank's share) and shared experts.

    `forward` is the obvious form and the oracle of the distributed one: every expert in turn looks for its
    tokens. It needs all experts here.
    """

    def __init__(
        self, config: ModelConfig, first_expert: int = 0, num_local_experts: int | None = None
    ) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, first_expert, num_local_experts or config.num_experts)
        self.shared = (
            FeedForward(config.hidden_size, config.num_shared_experts * config.expert_dim)
            if config.num_shared_experts
            else None
        )

    def forward(self, h_TC: Tensor) -> Tensor:
        routing = self.router(h_TC)
        y_TC = torch.zeros_like(h_TC, dtype=torch.float32)
        for expert in range(self.experts.num_experts):
            token, slot = torch.nonzero(routing.expert_TK == expert, as_tuple=True)
            gate, up = (h_TC[token] @ self.experts.gate_up.weight[expert].t()).chunk(2, dim=-1)
            rows = (nn.functional.silu(gate) * up) @ self.experts.down.weight[expert].t()
            y_TC = y_TC.index_add(0, token, rows.float() * routing.weight_TK[token, slot, None])
        y_TC = y_TC.to(h_TC.dtype)
        return y_TC if self.shared is None else y_TC + self.shared(h_TC)


class RowPlan(NamedTuple):
    """The order in which rows leave: sorted by expert, tokens in order within an expert.

    `slot_R[i]` is the flat (token * K + k) slot of row i, `row_TK` its inverse, `count_E` the rows for each
    expert of the whole model (int64).
    """

    slot_R: Tensor
    row_TK: Tensor
    count_E: Tensor


def count_rows(expert_R: Tensor, num_experts: int) -> Tensor:
    """Rows of each expert, (E,) int64. torch.bincount would make the host wait for the largest value."""
    return expert_R.new_zeros(num_experts).scatter_add_(0, expert_R, torch.ones_like(expert_R))


def plan_rows(expert_TK: Tensor, num_experts: int) -> RowPlan:
    """Sort the T * K slots by expert, stably, so that equal routings give equal orders everywhere."""
    flat = expert_TK.flatten()
    slot_R = torch.argsort(flat, stable=True)
    row_TK = torch.empty_like(slot_R)
    row_TK[slot_R] = torch.arange(slot_R.numel(), device=flat.device)
    return RowPlan(slot_R, row_TK.view_as(expert_TK), count_rows(flat, num_experts))


class _Permute(torch.autograd.Function):
    """rows[i] = h[token of slot i]. The backward gathers and sums in a fixed order instead of scattering."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, h_TC: Tensor, slot_R: Tensor, row_TK: Tensor
    ) -> Tensor:
        ctx.row_TK = row_TK  # type: ignore[attr-defined]
        return h_TC.index_select(0, slot_R.div(row_TK.shape[1], rounding_mode="floor"))

    @staticmethod
    def backward(ctx, grad_RC: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        row_TK: Tensor = ctx.row_TK
        grad_TKC = grad_RC.index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape)
        return grad_TKC.sum(1, dtype=torch.float32).to(grad_RC.dtype), None, None


class _Unpermute(torch.autograd.Function):
    """y[t] = sum over k of weight[t, k] * rows[row_TK[t, k]], summed in fp32."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows_RC: Tensor, weight_TK: Tensor, slot_R: Tensor, row_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RC, weight_TK)
        ctx.plan = (slot_R, row_TK)
        rows_TKC = rows_RC.index_select(0, row_TK.flatten()).unflatten(0, row_TK.shape)
        y_TC: Tensor = (weight_TK.unsqueeze(-1) * rows_TKC).sum(1)
        return y_TC.to(rows_RC.dtype)

    @staticmethod
    def backward(ctx, grad_TC: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        rows_RC, weight_TK = ctx.saved_tensors
        slot_R, row_TK = ctx.plan
        token_R = slot_R.div(row_TK.shape[1], rounding_mode="floor")
        grad_at_rows = grad_TC.index_select(0, token_R)
        grad_rows = weight_TK.flatten()[slot_R].unsqueeze(-1) * grad_at_rows
        grad_weight_R = (grad_at_rows.float() * rows_RC.float()).sum(-1)
        return grad_rows.to(rows_RC.dtype), grad_weight_R[row_TK.flatten()].view_as(row_TK), None, None


def kernel_order(plan: RowPlan) -> tokens.Order:
    """The plan as the token kernels take it."""
    token_R = plan.slot_R.div(plan.row_TK.shape[1], rounding_mode="floor")
    return tokens.Order(token_R, plan.row_TK, plan.count_E)


def permute(h_TC: Tensor, plan: RowPlan) -> Tensor:
    """Copy every token once per active expert, in the plan's order: (T, C) -> (T * K, C).

    On GPUs this and `unpermute` are kernels: they pass over the rows once, where indexing writes and reads
    K rows per token in between, and they have no atomics.
    """
    if h_TC.is_cuda:
        return tokens.permute(h_TC, kernel_order(plan))
    rows_RC: Tensor = _Permute.apply(h_TC, plan.slot_R, plan.row_TK)
    return rows_RC


def unpermute(rows_RC: Tensor, weight_TK: Tensor, plan: RowPlan) -> Tensor:
    """Bring the experts' answers home and add them up with the gate weights: (T * K, C) -> (T, C)."""
    if rows_RC.is_cuda:
        return tokens.unpermute(rows_RC, weight_TK, kernel_order(plan))
    y_TC: Tensor = _Unpermute.apply(rows_RC, weight_TK, plan.slot_R, plan.row_TK)
    return y_TC
