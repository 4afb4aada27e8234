"""Oracle: the single-device model with torch's AdamW and clip_grad_norm_, five steps of the same batches.

The ranks run the whole machinery: pipeline program, expert exchange, flat fp32 main gradients, sharded AdamW.

Adam divides by the size of the gradient, so where a gradient is rounding noise the update is noise of full
size, on one device as well. Elements whose clipped gradient was once below TOO_SMALL, ten times Adam's eps
(typical ones are 2e-3), are therefore left out of the comparison of weights: 3 to 5 % of these small models.
Half of them are H_pre and H_res of its first sublayer. Those have no gradient at all but for rounding: the
streams are still identical copies of the embedding there, so H_pre only scales the input of an RMSNorm and
H_res does nothing.
The rate is 1e-4: weights move by about 4e-4, and 1e-6 is 0.3 % of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mhc_dist.config import RunConfig
from mhc_dist.data.batches import Sequences
from mhc_dist.model.moe import Experts, MixtureOfExperts
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import cast_to_bf16, decays
from mhc_dist.parallel.agreement import check_agreement
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.stage import logical_name
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.train import train_step
from mhc_dist.worker import Worker
from tests.multi_rank.harness import run_ranks
from tests.multi_rank.pipeline_case import oracle_model
from tests.multi_rank.test_pipeline_parity import TOPOLOGIES, parity_config
from tests.small import random_sequences

NUM_STEPS = 5
TOO_SMALL = 1e-7
LARGEST_SHARE_TOO_SMALL = 0.06


class Trained(NamedTuple):
    """Losses and gradient norms of the steps; the first step's mean gradients before clipping, and after
    the last step fp32 weights and router biases, each by name.

    `compared[name]`, from the oracle, marks the elements whose update is not rounding noise.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    compared: dict[str, Tensor]


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


class GradientKeeper(Worker):
    """Keeps the gradients that the first optimizer step is about to use."""

    first_gradients: dict[str, Tensor]

    def step(self, losses: Sequence[Tensor]) -> None:
        if not hasattr(self, "first_gradients"):
            self.first_gradients = {
                name: gradient.clone() for name, gradient in self.engine.reduced_gradients().items()
            }
        super().step(losses)


def train_on_rank(rank: int, config: RunConfig) -> Trained:
    """Five steps on this rank."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    groups = ProcessGroups.build(topology)
    worker = GradientKeeper.build(config, plan_run(config), topology, groups, torch.device("cpu"))
    batches = FixedBatches(config)
    figures = [train_step(worker, batches, step) for step in range(NUM_STEPS)]  # type: ignore[arg-type]
    first_expert = {
        f"{name}.": module.first_expert
        for name, module in worker.stage.named_modules()
        if isinstance(module, Experts)
    }

    def logical(by_stage_name: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, tensor in by_stage_name.items():
            path = next((path for path in first_expert if name.startswith(path)), None)
            own = logical_name(name)
            if path is None:
                found[own] = tensor
            else:
                found |= {f"{own}/{first_expert[path] + local}": row for local, row in enumerate(tensor)}
        return found

    masters = {name: state.master for name, state in worker.engine.export_state().parameters.items()}
    biases = {f"{name}.bias_E": router.bias_E for name, router in worker.stage.routers()}
    return Trained(
        [step.loss for step in figures],
        [step.grad_norm for step in figures],
        logical(worker.first_gradients),
        logical(masters) | biases,
        {},
    )


@cache
def oracle_of(topology: tuple[int, int, int], kind: str, precision: str = "fp32") -> Trained:
    """One device knows no schedule, so both schedules are compared with one training. Read only."""
    return train_oracle(training_config(topology, "1f1b", kind, precision))


def train_oracle(config: RunConfig) -> Trained:
    """The same on one device. In bf16: compute on rounded copies of fp32 masters, sum gradients in fp32."""
    model = oracle_model(config)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if config.train.precision == "bf16":
        cast_to_bf16(model)
    compared = {name: torch.ones(master.shape, dtype=torch.bool) for name, master in masters.items()}
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
        if step == 0:
            gradients = {name: master.grad.clone() for name, master in masters.items()}  # type: ignore[union-attr]
        norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), optim.gradient_clipping).item())
        losses.append(loss_sum)
        for name, master in masters.items():
            assert master.grad is not None
            compared[name] &= (master.grad.abs() >= TOO_SMALL) | (master.grad == 0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(optim, config.train.steps, step)
        adam.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.router.balance(module.router.load_E.clone(), config.model.balance_rate)
    biases = {
        f"{name}.router.bias_E": module.router.bias_E
        for name, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
    }
    weights = {name: master.detach() for name, master in masters.items()}
    return Trained(losses, norms, one_by_one(gradients), one_by_one(weights) | biases, one_by_one(compared))


def one_by_one(by_name: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts taken apart, as ranks hold different ones of them."""
    flat: dict[str, Tensor] = {}
    for name, tensor in by_name.items():
        if ".experts." in name:
            flat |= {f"{name}/{expert}": row for expert, row in enumerate(tensor)}
        else:
            flat[name] = tensor
    return flat


class Differences(NamedTuple):
    """Against the oracle: relative errors of losses, norms and gradients (of the worst parameter, in norm);
    the largest absolute error of weights; the name of the worst gradient.

    A gradient's error is relative to its own norm plus a thousandth of the whole model's: a few small
    parameters (the head's stream weights, alphas) have gradients that nearly cancel, and no sum of fp32
    numbers gets those to 1e-5 of themselves.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    worst: str

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.1e}, norm {self.norm:.1e}, gradient {self.gradient:.1e} ({self.worst}),"
            f" weights {self.weight:.1e}"
        )


def merged(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks hold together; replicas must be equal bit for bit."""
    everything: dict[str, Tensor] = {}
    for by_name in ranks:
        for name, tensor in by_name.items():
            assert name not in everything or torch.equal(everything[name], tensor), f"{name} differs"
            everything[name] = tensor
    return everything


def differences(config: RunConfig, want: Trained) -> Differences:
    ranks: list[Trained] = run_ranks(config.num_processes, train_on_rank, config, timeout_seconds=110)
    for rank in ranks:
        assert rank.losses == ranks[0].losses, "ranks report different losses"
        assert rank.norms == ranks[0].norms, "ranks report different gradient norms"
    weights, gradients = merged([r.weights for r in ranks]), merged([r.gradients for r in ranks])
    assert weights.keys() == want.weights.keys()
    assert gradients.keys() == want.gradients.keys()
    # The comparison says nothing about clipping if clipping never bites.
    assert max(want.norms) > config.optim.gradient_clipping
    left_out = sum(int((~mask).sum()) for mask in want.compared.values())
    assert left_out < LARGEST_SHARE_TOO_SMALL * sum(mask.numel() for mask in want.compared.values())

    total = torch.stack([gradient.norm() for gradient in want.gradients.values()]).norm().item()
    gradient_errors = {}
    for name, gradient in want.gradients.items():
        if gradient.norm() == 0:  # an expert without tokens
            assert gradients[name].norm() == 0, f"{name}: the oracle's gradient is zero"
        else:
            scale = gradient.norm().item() + 1e-3 * total
            gradient_errors[name] = (gradients[name] - gradient).norm().item() / scale
    worst = max(gradient_errors, key=gradient_errors.__getitem__)
    weight_errors = torch.cat(
        [(weights[name] - want.weights[name])[mask].abs() for name, mask in want.compared.items()]
    )
    return Differences(
        max(abs(a - b) / b for a, b in zip(ranks[0].losses, want.losses, strict=True)),
        max(abs(a - b) / b for a, b in zip(ranks[0].norms, want.norms, strict=True)),
        gradient_errors[worst],
        weight_errors.max().item(),
        worst,
    )


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("kind", ["residual", "mhc"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: "x".join(map(str, t)))
def test_training_equals_single_device(topology: tuple[int, int, int], kind: str, schedule: str) -> None:
    found = differences(training_config(topology, schedule, kind), oracle_of(topology, kind))
    print(f"{topology} {schedule} {kind}: {found}")
    assert found.loss < 1e-6
    assert found.norm < 1e-5
    assert found.gradient < 1e-5
    assert found.weight < 1e-6


def distance(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """Root of the summed squared differences."""
    return torch.stack([(a[name] - b[name]).square().sum() for name in names]).sum().sqrt().item()


@pytest.mark.parametrize("topology", [(2, 2, 2), (1, 4, 4)], ids=lambda t: "x".join(map(str, t)))
def test_bf16_is_as_close_to_fp32_as_on_one_device(topology: tuple[int, int, int]) -> None:
    """Oracle: the single-device model in fp32 (the truth), and in bf16 with fp32 masters (rounding's cost).

    Both bf16 runs round activations to 8 bits, in different orders, so they differ from each other about as
    much as from the truth. Stated: the ranks are no further from fp32 than one device is, within 25 %.
    """
    config = training_config(topology, "dualpipev", "mhc", precision="bf16")
    ranks: list[Trained] = run_ranks(config.num_processes, train_on_rank, config, timeout_seconds=110)
    rounded = oracle_of(topology, "mhc", "bf16")
    truth = oracle_of(topology, "mhc")
    weights, gradients = merged([r.weights for r in ranks]), merged([r.gradients for r in ranks])
    names = list(truth.gradients)
    for what, got, one_device, want in (
        ("gradients", gradients, rounded.gradients, truth.gradients),
        ("weights", weights, rounded.weights, truth.weights),
    ):
        ours, theirs = distance(got, want, names), distance(one_device, want, names)
        print(f"bf16 {topology}: {what} {ours:.2e} from fp32, one device {theirs:.2e}")
        assert ours < 1.25 * theirs
        assert theirs > 0
    for loss, want_loss in zip(ranks[0].losses, truth.losses, strict=True):
        assert loss == pytest.approx(want_loss, rel=5e-3)


def test_bf16_gradients_are_the_same_put_off_or_not() -> None:
    """Oracle: 1f1b, which puts no weight gradient off, against zb1p on the same chunks, bit for bit."""
    runs: list[list[Trained]] = []
    for schedule in ("1f1b", "zb1p"):
        config = training_config((2, 1, 1), schedule, "mhc", precision="bf16")
        runs.append(run_ranks(2, train_on_rank, config, timeout_seconds=110))
    for at_once, put_off in zip(*runs, strict=True):
        assert put_off.losses == at_once.losses
        for got, want in ((put_off.gradients, at_once.gradients), (put_off.weights, at_once.weights)):
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


COMMUNICATION = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_single",
    "all_gather_object",
    "reduce_scatter_single",
    "broadcast",
    "barrier",
    "send",
    "recv",
    "isend",
    "irecv",
)


def groups_used(rank: int, config: RunConfig) -> tuple[set[str], set[str]]:
    """Names of the groups over which this rank communicates before its first step, and in it."""
    used: set[str] = set()

    def recording(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            used.add((named.get("group") or dist.group.WORLD).group_name)
            return real(*arguments, **named)

        return call

    for name in COMMUNICATION:
        setattr(dist, name, recording(getattr(dist, name)))
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    programs = plan_run(config)
    check_agreement({})
    groups = ProcessGroups.build(topology)
    worker = Worker.build(config, programs, topology, groups, torch.device("cpu"))
    before = set(used)
    used.clear()
    train_step(worker, FixedBatches(config), 0)  # type: ignore[arg-type]
    return before, used - {groups.control.group_name}


def test_no_communicator_is_first_used_in_a_step() -> None:
    """Oracle: calls of torch.distributed. With NCCL a first use takes seconds of a step's time limit.

    The group that is gloo's in any case is left out.
    """
    config = training_config((2, 4, 2), "dualpipev", "mhc")
    for before, within in run_ranks(8, groups_used, config, timeout_seconds=110):
        # World, two of experts, three of the optimizer and of balancing, two channels.
        assert len(within) == 8
        assert within <= before
