"""Oracle: the single-device model with torch's AdamW and clip_grad_norm_, five steps of the same batches.

The ranks run the whole machinery: pipeline program, expert exchange, flat fp32 main gradients, sharded AdamW.

Adam divides by the size of the gradient, so where a gradient is rounding noise the update is noise of full
size. Two consequences here. The rate is 1e-4 (weights then move by about 4e-4, so that 1e-6 is 0.3 % of it);
at 1e-3 single elements with gradients below eps = 1e-8 differ by up to 6e-6. And parameters that cannot have
a gradient are left out, see `without_gradient`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.data.batches import Sequences
from mhc_dist.model.moe import Experts, MixtureOfExperts
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import cast_to_bf16, decays
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.program import plan_run
from mhc_dist.topology import Topology
from mhc_dist.train import train_step
from mhc_dist.worker import Worker
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.pipeline_case import oracle_model
from tests.multi_rank.test_pipeline_parity import TOPOLOGIES, parity_config
from tests.small import random_sequences

NUM_STEPS = 5


def training_config(
    topology: tuple[int, int, int], schedule: str, kind: str, precision: str = "fp32"
) -> RunConfig:
    config = parity_config(topology, schedule, kind)
    optim = config.optim.model_copy(update={"peak_learning_rate": 1e-4})
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"optim": optim, "train": train})


class FixedBatches:
    """Stands in for `Batches`: the random global batch that the oracle sees."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def sequences(self, step: int, first: int, count: int) -> Sequences:
        tokens, targets = random_sequences(self._config, step)
        return Sequences(tokens[first : first + count].numpy(), targets[first : first + count].numpy())


def train_on_rank(rank: int, config: RunConfig) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms, and this rank's fp32 master weights by logical name after the last step."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    groups = ProcessGroups.build(topology)
    worker = Worker.build(config, plan_run(config), topology, groups, torch.device("cpu"))
    batches = FixedBatches(config)
    figures = [train_step(worker, batches, step, stop=False) for step in range(NUM_STEPS)]  # type: ignore[arg-type]
    masters: dict[str, Tensor] = {}
    state = worker.engine.export_state()
    first_expert = {
        f"{name}.": module.first_expert
        for name, module in worker.stage.named_modules()
        if isinstance(module, Experts)
    }
    for name, parameter in state.parameters.items():
        logical = name.partition(".")[2]
        path = next((path for path in first_expert if name.startswith(path)), None)
        if path is None:
            masters[logical] = parameter.master
            continue
        for local, expert in enumerate(parameter.master):
            masters[f"{logical}/{first_expert[path] + local}"] = expert
    biases = {f"{name}.bias_E": router.bias_E for name, router in worker.stage.routers()}
    return [f.loss for f in figures], [f.grad_norm for f in figures], masters | biases


def train_oracle(config: RunConfig) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same on one device. In bf16: compute on rounded copies of fp32 masters, gradients summed in fp32."""
    model = oracle_model(config)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if config.train.precision == "bf16":
        cast_to_bf16(model)
    optim = config.optim
    groups = [
        {"params": [p for p in masters.values() if decays(p)], "weight_decay": optim.weight_decay},
        {"params": [p for p in masters.values() if not decays(p)], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)
    rows, losses, norms = config.data.sequences_per_microbatch, [], []
    for step in range(NUM_STEPS):
        tokens, targets = random_sequences(config, step)
        parts = [(tokens[i : i + rows], targets[i : i + rows]) for i in range(0, len(tokens), rows)]
        adam.zero_grad(set_to_none=False)
        loss_sum = 0.0
        for part in parts:
            loss = model(*part) / len(parts)
            loss.backward()
            loss_sum += loss.item()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                master = masters[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), optim.gradient_clipping).item())
        losses.append(loss_sum)
        for group in adam.param_groups:
            group["lr"] = learning_rate(optim, config.train.steps, step)
        adam.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.router.balance(module.router.load_E.clone(), config.model.balance_rate)
    flat: dict[str, Tensor] = {}
    for name, master in masters.items():
        if ".experts." in name:
            flat |= {f"{name}/{expert}": row for expert, row in enumerate(master.detach())}
        else:
            flat[name] = master.detach()
    biases = {
        f"{name}.router.bias_E": module.router.bias_E
        for name, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
    }
    return losses, norms, flat | biases


def without_gradient(name: str, master: Tensor) -> Tensor:
    """Elements whose gradient is zero but for rounding: H_pre and H_res of the model's first sublayer.

    Its streams are identical copies of the embedding. H_pre then only scales the input of an RMSNorm, and a
    matrix whose rows sum to one changes nothing.
    """
    n = 4
    mask = torch.zeros(master.shape, dtype=torch.bool)
    if name == "layers.0.attention_connection.alpha_3":
        mask[[0, 2]] = True
    elif name in ("layers.0.attention_connection.phi_MD", "layers.0.attention_connection.bias_M"):
        mask[:n] = True
        mask[2 * n :] = True
    return mask


def largest_differences(config: RunConfig) -> tuple[float, float, float]:
    """Relative error of losses and of gradient norms, absolute error of parameters, against the oracle."""
    ranks = run_ranks(config.num_processes, train_on_rank, config, timeout_seconds=110)
    losses, norms, want = train_oracle(config)
    got: dict[str, Tensor] = {}
    for rank_losses, rank_norms, masters in ranks:
        assert rank_losses == ranks[0][0], "ranks report different losses"
        assert rank_norms == ranks[0][1], "ranks report different gradient norms"
        for name, master in masters.items():
            if name in got:
                assert torch.equal(got[name], master), f"{name} differs between replicas"
            got[name] = master
    assert got.keys() == want.keys()
    # The step is of no use as a test if clipping never bites.
    assert max(norms) > config.optim.gradient_clipping
    return (
        max(abs(a - b) / b for a, b in zip(ranks[0][0], losses, strict=True)),
        max(abs(a - b) / b for a, b in zip(ranks[0][1], norms, strict=True)),
        max(
            (got[name] - want[name]).masked_fill(without_gradient(name, want[name]), 0.0).abs().max().item()
            for name in want
        ),
    )


@pytest.mark.parametrize("kind", ["residual", "mhc"])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: "x".join(map(str, t)))
def test_five_steps_equal_single_device(topology: tuple[int, int, int], schedule: str, kind: str) -> None:
    loss, norm, parameter = largest_differences(training_config(topology, schedule, kind))
    print(f"{topology} {schedule} {kind}: loss {loss:.1e}, norm {norm:.1e}, parameters {parameter:.1e}")
    assert loss < 1e-6
    assert norm < 1e-5
    assert parameter < 1e-6


@pytest.mark.parametrize("topology", [(2, 2, 2), (1, 4, 4)], ids=lambda t: "x".join(map(str, t)))
def test_bf16_stays_within_its_rounding(topology: tuple[int, int, int]) -> None:
    """Oracle: the single-device model in bf16 with fp32 masters.

    Both round activations to 8 bits (relative 2^-9 = 0.002), but sum rows in different orders, so they drift
    apart by a fraction of that: losses agree to 1e-3 and weights move within 5 % of the distance travelled.
    """
    config = training_config(topology, "dualpipev", "mhc", precision="bf16")
    loss, norm, parameter = largest_differences(config)
    print(f"bf16 {topology}: loss {loss:.1e}, norm {norm:.1e}, parameters {parameter:.1e}")
    assert loss < 1e-3
    assert norm < 1e-2
    assert parameter < 4e-4
