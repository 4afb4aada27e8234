"""Oracle: every expert in turn looks for its tokens (`MixtureOfExperts.forward`)."""

from __future__ import annotations

import pytest
import torch
from mhc_kernels import tokens

from mhc_dist.model.initialize import initialize
from mhc_dist.model.moe import MixtureOfExperts, Router, kernel_order, permute, plan_rows, unpermute
from mhc_dist.parallel.expert_exchange import ExpertExchange, sort_by_expert, sort_by_sender
from tests.small import small_config

CONFIG = small_config(model={"num_experts": 6, "num_active_experts": 3})


def layer() -> MixtureOfExperts:
    moe = MixtureOfExperts(CONFIG.model)
    initialize(moe, CONFIG)
    return moe


def by_rows(moe: MixtureOfExperts, h_TC: torch.Tensor) -> torch.Tensor:
    """The path of the pipeline: permute, exchange (group of one), grouped experts, unpermute."""
    exchange = ExpertExchange(CONFIG.model.num_experts)
    routing = moe.router(h_TC)
    plan = plan_rows(routing.expert_TK, CONFIG.model.num_experts)
    arrival = exchange.issue_counts(plan.count_E).wait()
    arrived = exchange.issue_dispatch(permute(h_TC, plan), arrival).wait()
    answers = moe.experts(sort_by_expert(arrived, arrival), arrival.expert_counts)
    returned = exchange.issue_combine(sort_by_sender(answers, arrival), arrival).wait()
    y_TC = unpermute(returned, routing.weight_TK, plan)
    assert moe.shared is not None
    return y_TC + moe.shared(h_TC)


@pytest.mark.parametrize("hot", [False, True], ids=["random", "one hot expert"])
def test_rows_equal_the_obvious_form(hot: bool) -> None:
    torch.manual_seed(0)
    moe = layer()
    if hot:
        moe.router.bias_E[2] = 100.0  # every token goes to expert 2
    h_TC = torch.randn(17, CONFIG.model.hidden_size)
    inputs = [h_TC.clone().requires_grad_(), h_TC.clone().requires_grad_()]
    outputs = []
    gradients = []
    for function, h in zip((moe.forward, lambda h: by_rows(moe, h)), inputs, strict=True):
        moe.zero_grad()
        y = function(h)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        outputs.append(y.detach())
        gradients.append({name: p.grad for name, p in moe.named_parameters()})
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, msg=lambda text, name=name: f"{name}: {text}")


def test_gate_weights_sum_to_the_scale_and_ignore_the_bias() -> None:
    """Oracle: the definition; the bias decides who is chosen, never how much he counts."""
    torch.manual_seed(0)
    router = Router(CONFIG.model)
    torch.nn.init.normal_(router.weight)
    h_TC = torch.randn(11, CONFIG.model.hidden_size)
    router.bias_E[4] = 50.0
    routing = router(h_TC)
    assert (routing.expert_TK == 4).any(1).all()
    scores = torch.sigmoid(h_TC @ router.weight.t()).gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, scores / scores.sum(1, keepdim=True))


def test_balancing_moves_tokens_to_starved_experts() -> None:
    """Oracle: load counts; after some steps the hottest expert's share falls towards the mean."""
    torch.manual_seed(0)
    router = Router(CONFIG.model)
    torch.nn.init.normal_(router.weight, std=0.3)
    h_TC = torch.randn(512, CONFIG.model.hidden_size) + 0.5
    loads = []
    for _ in range(60):
        router(h_TC)
        loads.append(router.load_E.clone())
        router.balance(router.load_E.clone(), rate=0.02)
    mean = 512 * 3 / CONFIG.model.num_experts
    assert loads[-1].max() - mean < 0.2 * (loads[0].max() - mean)
    assert loads[0].sum() == loads[-1].sum() == 512 * 3


def test_evaluation_does_not_count_as_load() -> None:
    """Oracle: the load stays zero."""
    router = Router(CONFIG.model)
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        router(torch.randn(5, CONFIG.model.hidden_size))
    assert router.load_E.sum() == 0


def test_extreme_logits_stay_finite() -> None:
    """Oracle: sigmoids that all underflow still give finite weights and gradients."""
    router = Router(CONFIG.model)
    torch.nn.init.constant_(router.weight, -10.0)
    h_TC = torch.full((3, CONFIG.model.hidden_size), 10.0, requires_grad=True)
    routing = router(h_TC)
    routing.weight_TK.sum().backward()
    assert routing.weight_TK.isfinite().all()
    assert h_TC.grad.isfinite().all()


def test_the_order_that_gpu_kernels_get_is_the_plan() -> None:
    """Oracle: the path of CPUs, forward and backward; the kernels' package has a form of its own."""
    torch.manual_seed(0)
    expert_TK = torch.stack([torch.randperm(6)[:3] for _ in range(20)])
    plan = plan_rows(expert_TK, 6)
    h_TC, weight_TK = torch.randn(20, 16, requires_grad=True), torch.rand(20, 3, requires_grad=True)
    results = []
    for there, back in ((permute, unpermute), (tokens.permute, tokens.unpermute)):
        order = plan if there is permute else kernel_order(plan)
        y_TC = back(there(h_TC, order).sin(), weight_TK, order)
        results.append((y_TC, *torch.autograd.grad(y_TC.square().sum(), (h_TC, weight_TK))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
