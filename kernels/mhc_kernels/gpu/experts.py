"""The mixture of experts on a device: token movement, grouped products, sums of products in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_kernels import tokens
from mhc_kernels.gpu.plan import NEEDS_GPU, Outcome, Plan
from mhc_kernels.gpu.problem import relative_error

EXPERTS, CHOSEN = 16, 4
FP32_LIMIT, BF16_LIMIT = 1e-5, 1e-2


def token_movement(dtype: torch.dtype, plan: Plan) -> Outcome:
    """permute, SwiGLU and weighted unpermute against their CPU paths in fp64, forward and backward, twice."""
    generator = torch.Generator().manual_seed(1)
    num_tokens, channels = plan.experts
    expert_TK = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(num_tokens)]
    )
    x_TC = torch.randn(num_tokens, channels, generator=generator).to(dtype)
    weight_TK = torch.rand(num_tokens, CHOSEN, generator=generator)

    def through(device: str, widen: bool = False) -> list[Tensor]:
        wide = torch.float64 if widen else None
        leaves = [t.to(device, wide).requires_grad_() for t in (x_TC, weight_TK)]
        order = tokens.order_by_expert(expert_TK.to(device), EXPERTS)
        rows = tokens.swiglu(tokens.permute(leaves[0], order))
        y_TC = tokens.unpermute(rows, leaves[1], order)
        return [y_TC.detach(), *torch.autograd.grad(y_TC.square().sum(), leaves)]

    there, again, exact = through(plan.device), through(plan.device), through("cpu", widen=True)
    limit = FP32_LIMIT if dtype == torch.float32 else BF16_LIMIT
    names = ("y", "d x", "d weight")
    errors = {n: relative_error(a.cpu(), b) for n, a, b in zip(names, there, exact, strict=True)}
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= limit]
    if not all(torch.equal(a, b) for a, b in zip(there, again, strict=True)):
        wrong.append("results differ from run to run")
    return Outcome(not wrong, {"errors": errors, "limit": limit}, "; ".join(wrong))


def grouped_product(plan: Plan) -> Outcome:
    """torch's grouped product in bf16 against a loop over the experts in fp64; one expert has no rows."""
    generator = torch.Generator().manual_seed(1)
    channels, width = plan.experts[1], 2 * plan.experts[1]
    counts = [5, 0, 67, 128]
    rows_RC = torch.randn(sum(counts), channels, generator=generator)
    bank_ECD = torch.randn(len(counts), channels, width, generator=generator) * channels**-0.5
    leaves = [t.to(plan.device, torch.bfloat16).requires_grad_() for t in (rows_RC, bank_ECD)]
    ours = tokens.grouped_matmul(leaves[0], leaves[1], torch.tensor(counts, device=plan.device))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    parts = zip(wide[0].split(counts), wide[1], strict=True)
    theirs = torch.cat([part @ weight for part, weight in parts])
    pairs = [(ours, theirs)]
    pairs += zip(
        torch.autograd.grad(ours.float().square().sum(), leaves),
        torch.autograd.grad(theirs.square().sum(), wide),
        strict=True,
    )
    names = ("product", "d rows", "d weights")
    errors = {name: relative_error(a, b) for name, (a, b) in zip(names, pairs, strict=True)}
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= BF16_LIMIT]
    return Outcome(not wrong, {"errors": errors, "limit": BF16_LIMIT}, "; ".join(wrong))


def sums_in_fp32(plan: Plan) -> Outcome:
    """sum += grad^T x with bf16 factors and an fp32 sum, in one call that rounds nothing to bf16: the sums of
    weight gradients over microbatches depend on `torch.addmm(..., out_dtype=...)` into its own argument."""
    if not torch.cuda.is_available():
        return NEEDS_GPU
    generator = torch.Generator().manual_seed(1)
    rows, channels = plan.experts
    grad_RO, x_RI = (
        torch.randn(rows, channels, generator=generator).to(plan.device, torch.bfloat16) for _ in range(2)
    )
    sum_OI = torch.randn(channels, channels, generator=generator).to(plan.device)
    exact_OI = sum_OI.double()
    memory = sum_OI.data_ptr()
    for _ in range(3):
        torch.addmm(sum_OI, grad_RO.t(), x_RI, out_dtype=torch.float32, out=sum_OI)
        exact_OI += grad_RO.t().double() @ x_RI.double()
    error = relative_error(sum_OI, exact_OI)
    wrong = [] if error <= FP32_LIMIT else [f"off by {error:.1e}: rounding to bf16 makes 2e-3"]
    if sum_OI.data_ptr() != memory:
        wrong.append("the sum was moved to other memory")
    return Outcome(not wrong, {"error": error, "limit": FP32_LIMIT}, "; ".join(wrong))
