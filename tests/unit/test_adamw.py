import subprocess
import sys

import torch

from mhc_dist.optim.adamw import FlatAdamW


def test_steps_equal_torch_adamw() -> None:
    # Oracle: torch.optim.AdamW over five steps with changing rates; one group decays, one does not.
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(17, generator=generator), torch.randn(5, generator=generator)]
    decay = [0.1, 0.0]
    mine = [tensor.clone().requires_grad_() for tensor in start]
    theirs = [tensor.clone().requires_grad_() for tensor in start]
    groups = [{"params": [p], "lr": 0.0, "weight_decay": d} for p, d in zip(mine, decay, strict=True)]
    flat = FlatAdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    reference = torch.optim.AdamW(
        [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decay, strict=True)],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for group in (*flat.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 * (step + 1)
        flat.step()
        reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
        state = flat.state_of(p)
        assert state["step"].item() == 5
        torch.testing.assert_close(state["exp_avg"], reference.state[q]["exp_avg"], rtol=0, atol=1e-7)
        torch.testing.assert_close(state["exp_avg_sq"], reference.state[q]["exp_avg_sq"], rtol=0, atol=1e-7)


def test_the_compiler_is_not_imported() -> None:
    # Oracle: the modules of a fresh process that took a step; the import costs each process two seconds.
    program = """
import sys, torch
from mhc_dist.optim.adamw import FlatAdamW
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
FlatAdamW([{"params": [p], "lr": 0.1, "weight_decay": 0.0}], (0.9, 0.95), 1e-8).step()
assert p[0].item() < 1
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
