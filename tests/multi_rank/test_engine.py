"""The optimizer engine on several ranks against torch's AdamW and clip_grad_norm_ in one process.

The model under test has no communication of its own: every stage is a dense part and a share of experts with
a loss each. What an expert group would bring to a rank by all-to-all, the tokens of all its data ranks for
the local experts, the test hands to it directly. So the gradients are exactly those of the real thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed.comm.comm as deepspeed_comm  # type: ignore[import-untyped]
import pytest
import torch
from deepspeed.ops import __compatible_ops__ as compatible_ops  # type: ignore[import-untyped]
from torch import Tensor, nn

from mhc_dist.config import RunConfig
from mhc_dist.optim.deepspeed_engine import check_contract
from mhc_dist.optim.engine import OptimizerEngine, StepOutcome
from mhc_dist.optim.learning_rate import learning_rate
from mhc_dist.optim.parameter_groups import cast_to_bf16, decays
from mhc_dist.topology import Topology
from tests.multi_rank.harness import RankFailedError, run_ranks

WIDTH, EXPERTS, MICROBATCHES, ROWS, STEPS = 6, 4, 3, 5, 5
CLIP = 0.05  # below the norm of every step here, so that clipping always acts

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2), (1, 4, 2), (1, 4, 4), (2, 4, 2)]


def run_config(topology: Topology, **sections: Any) -> RunConfig:
    model = {
        "num_layers": 4,
        "hidden_size": 16,
        "vocab_size": 16,
        "num_heads": 2,
        "num_experts": EXPERTS,
        "num_active_experts": 2,
        "expert_dim": 8,
    }
    defaults: dict[str, Any] = {
        "model": model,
        "parallel": {"pipeline": topology.pipeline, "data": topology.data, "expert": topology.expert},
        "schedule": {"name": "1f1b", "num_microbatches": 4},
        "optim": {"gradient_clipping": CLIP, "warmup_steps": 2, "peak_learning_rate": 1e-2},
        "train": {"steps": STEPS},
    }
    return RunConfig.model_validate({**defaults, **sections})


class Stage(nn.Module):
    """Dense weights, a vector kept in fp32, and experts `first`..`first + count`; each kind is optional."""

    def __init__(self, stage: int, first: int, count: int, dense: bool = True, experts: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(stage)
        weight = torch.randn(WIDTH, WIDTH, generator=generator)
        gain = torch.randn(WIDTH, generator=generator)
        all_experts = torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)
        if dense:
            self.weight = nn.Parameter(weight)
            self.gain = nn.Parameter(gain)
            self.gain.keep_fp32 = True  # type: ignore[attr-defined]
        if experts:
            self.experts = nn.Parameter(all_experts[first : first + count].clone())
            self.experts.is_expert = True  # type: ignore[attr-defined]
        self.first, self.count = first, count

    def dense_loss(self, x: Tensor) -> Tensor:
        y = (x.to(self.weight.dtype) @ self.weight).float() * self.gain
        return y.square().mean()

    def expert_loss(self, x: Tensor, expert_of_row: Tensor) -> Tensor:
        """Sum over local experts; an expert without rows is not touched at all."""
        loss = torch.zeros(())
        for local in range(self.count):
            rows = x[expert_of_row == self.first + local]
            if rows.shape[0]:
                y = rows.to(self.experts.dtype) @ self.experts[local]
                loss = loss + (y.float() - 1).square().sum() / (ROWS * WIDTH)
        return loss


@dataclass(frozen=True)
class Shape:
    """Which stages hold dense parameters and which hold experts; all by default."""

    topology: Topology
    precision: str = "fp32"
    dense_stages: tuple[int, ...] = (0, 1)
    expert_stages: tuple[int, ...] = (0, 1)

    def stage(self, stage: int, first: int, count: int) -> Stage:
        return Stage(stage, first, count, stage in self.dense_stages, stage in self.expert_stages)

    def config(self) -> RunConfig:
        train = {"steps": STEPS, "precision": self.precision}
        return run_config(self.topology, train=train)


def batch(step: int, microbatch: int, data_rank: int) -> tuple[Tensor, Tensor]:
    """Rows, and the expert of each. Only data ranks 0 and 1 use experts 0 and 1, and nobody does in step 3.

    So there are ranks whose experts get no gradient while their replicas' do, and experts nobody trains.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * data_rank + microbatch)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    lowest = 0 if data_rank < 2 and step != 3 else 2
    return x, torch.randint(lowest, EXPERTS, (ROWS,), generator=generator)


def run_engine(rank: int, shape: Shape) -> tuple[list[StepOutcome], dict[str, Any]]:
    """STEPS steps on one rank; returns outcomes and whole final tensors, experts by their global number."""
    place = shape.topology.at(rank)
    share = EXPERTS // place.expert
    module = shape.stage(place.pipeline_rank, place.expert_rank * share, share)
    engine = OptimizerEngine(module, shape.config(), place)
    outcomes = []
    group = [r - place.data_group_ranks[0] for r in place.expert_group_ranks]
    for step in range(STEPS):
        for microbatch in range(MICROBATCHES):
            if hasattr(module, "weight"):
                x, _ = batch(step, microbatch, place.data_rank)
                (module.dense_loss(x) / MICROBATCHES).backward()
            if hasattr(module, "experts"):
                for data_rank in group:
                    loss = module.expert_loss(*batch(step, microbatch, data_rank)) / MICROBATCHES
                    if loss.requires_grad:
                        # As a deferred weight gradient arrives: not through autograd's accumulation.
                        (gradient,) = torch.autograd.grad(loss, [module.experts])
                        module.experts.gradient_sum().add_(gradient)  # type: ignore[attr-defined]
        outcomes.append(engine.finish_step())
    state = engine.export_state()
    assert state.num_steps == state.num_updates == STEPS
    final: dict[str, Any] = {"stage": place.pipeline_rank, "first": module.first}
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        entry = state.parameters[name]
        final[name] = (entry.master, entry.first_moment, entry.second_moment, parameter.detach().float())
    engine.close()
    return outcomes, final


def run_reference(shape: Shape) -> tuple[list[float], list[dict[str, tuple[Tensor, ...]]]]:
    """The same training in one process; fp32 masters, module weights in the run's precision."""
    config = shape.config()
    stages = [shape.stage(stage, 0, EXPERTS) for stage in range(shape.topology.pipeline)]
    working = [parameter for stage in stages for parameter in stage.parameters()]
    # Masters start from the weights as drawn; what computes starts from their rounding.
    masters = [nn.Parameter(parameter.detach().clone()) for parameter in working]
    for stage in stages:
        if shape.precision == "bf16":
            cast_to_bf16(stage)
    groups = [
        {"params": [master], "weight_decay": config.optim.weight_decay if decays(master) else 0.0}
        for master in masters
    ]
    adamw = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    norms = []
    for step in range(STEPS):
        for master in masters:
            master.grad = torch.zeros_like(master)
        for data_rank in range(shape.topology.data):
            for microbatch in range(MICROBATCHES):
                x, expert_of_row = batch(step, microbatch, data_rank)
                loss = torch.zeros(())
                for index, stage in enumerate(stages):
                    if index in shape.dense_stages:
                        loss = loss + stage.dense_loss(x)
                    if index in shape.expert_stages:
                        loss = loss + stage.expert_loss(x, expert_of_row)
                (loss / MICROBATCHES).backward()
                for parameter, master in zip(working, masters, strict=True):
                    if parameter.grad is not None:
                        assert master.grad is not None
                        master.grad += parameter.grad / shape.topology.data
                        parameter.grad = None
        norms.append(float(nn.utils.clip_grad_norm_(masters, CLIP)))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config.optim, STEPS, step)
        adamw.step()
        for parameter, master in zip(working, masters, strict=True):
            parameter.data.copy_(master.data)
    by_parameter = dict(zip(working, masters, strict=True))
    final: list[dict[str, tuple[Tensor, ...]]] = []
    for stage in stages:
        entries: dict[str, tuple[Tensor, ...]] = {}
        for name, parameter in stage.named_parameters():
            master = by_parameter[parameter]
            moments = adamw.state[master]
            entries[name] = (
                master.detach(),
                moments["exp_avg"],
                moments["exp_avg_sq"],
                parameter.detach().float(),
            )
        final.append(entries)
    return norms, final


def compare(shape: Shape, tolerance: float) -> None:
    """Masters, moments, weights and reported norms of every rank against the single process."""
    norms, reference = run_reference(shape)
    assert min(norms) > CLIP
    share = EXPERTS // shape.topology.expert
    for outcomes, final in run_ranks(shape.topology.world_size, run_engine, shape):
        assert [outcome.grad_norm for outcome in outcomes] == pytest.approx(norms, rel=tolerance)
        assert all(outcome.applied for outcome in outcomes)
        stage, first = final.pop("stage"), final.pop("first")
        assert set(final) == set(reference[stage])
        for name, tensors in final.items():
            for mine, theirs in zip(tensors, reference[stage][name], strict=True):
                expected = theirs[first : first + share] if name == "experts" else theirs
                torch.testing.assert_close(mine, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("pipeline", "data", "expert"), LAYOUTS)
def test_fp32_equals_single_process_adamw_with_clipping(pipeline: int, data: int, expert: int) -> None:
    # Oracle: torch.optim.AdamW and clip_grad_norm_ over the whole model and batch in one process.
    compare(Shape(Topology(pipeline, data, expert)), tolerance=1e-6)


@pytest.mark.parametrize(("pipeline", "data", "expert"), [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_bf16_equals_a_single_process_with_fp32_masters(pipeline: int, data: int, expert: int) -> None:
    # Oracle: the same, with fp32 masters and gradients summed in fp32; only the order of sums differs.
    compare(Shape(Topology(pipeline, data, expert), precision="bf16"), tolerance=1e-6)


@pytest.mark.parametrize(
    ("dense_stages", "expert_stages"), [((0, 1), (1,)), ((0, 1), ()), ((0,), (1,))], ids=str
)
def test_stages_may_lack_experts_or_dense_parameters(
    dense_stages: tuple[int, ...], expert_stages: tuple[int, ...]
) -> None:
    # Oracle: the same single process; the trap is a hang or a crash in the gradient norm.
    layout = Topology(2, 2, 2)
    compare(Shape(layout, dense_stages=dense_stages, expert_stages=expert_stages), tolerance=1e-6)


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_reduced_gradients_do_not_depend_on_the_expert_group(expert: int) -> None:
    # Oracle: autograd over the global batch in one process; the trap is a factor of `expert`.
    def first_gradients(rank: int) -> tuple[int, dict[str, Tensor]]:
        place = Topology(1, 4, expert, rank)
        share = EXPERTS // expert
        module = Stage(0, place.expert_rank * share, share)
        engine = OptimizerEngine(module, run_config(place), place)
        module.dense_loss(batch(0, 0, place.data_rank)[0]).backward()
        for data_rank in place.expert_group_ranks:
            loss = module.expert_loss(*batch(0, 0, data_rank))
            if loss.requires_grad:
                loss.backward()
        engine.reduce_gradients()
        return module.first, engine.reduced_gradients()

    whole = Stage(0, 0, EXPERTS)
    for data_rank in range(4):
        x, expert_of_row = batch(0, 0, data_rank)
        ((whole.dense_loss(x) + whole.expert_loss(x, expert_of_row)) / 4).backward()
    for first, gradients in run_ranks(4, first_gradients):
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None
            share = slice(first, first + EXPERTS // expert) if name == "experts" else slice(None)
            torch.testing.assert_close(gradients[name], parameter.grad[share], rtol=1e-6, atol=1e-8)


def test_a_gradient_that_is_not_finite_is_skipped_everywhere() -> None:
    # Oracle: weights before the bad step, and a run that never had it.
    def run(rank: int, poisoned: bool) -> tuple[bool, list[float], int, int]:
        place = Topology(2, 2, 2, rank)
        module = Stage(place.pipeline_rank, place.expert_rank * 2, 2)
        engine = OptimizerEngine(module, run_config(place), place)
        applied = True
        if poisoned:
            module.dense_loss(batch(0, 0, place.data_rank)[0]).backward()
            if rank == 1:
                engine.main_gradient(module.weight)[0, 0] = float("inf")
            before = module.weight.detach().clone()
            applied = engine.finish_step().applied
            assert torch.equal(before, module.weight.detach())
            assert not engine.main_gradient(module.weight).any()
        else:
            engine.continue_from(num_steps=1, num_updates=0)
        module.dense_loss(batch(1, 0, place.data_rank)[0]).backward()
        assert engine.finish_step().applied
        state = engine.export_state()
        return applied, module.weight.flatten().tolist(), state.num_steps, state.num_updates

    for bad, clean in zip(run_ranks(4, run, True), run_ranks(4, run, False), strict=True):
        assert bad == (False, *clean[1:])
        assert bad[2:] == (2, 1)


def test_copied_partitions_continue_bit_equal() -> None:
    # Oracle: the run that was not interrupted.
    def step_once(engine: OptimizerEngine, module: Stage, place: Topology, step: int) -> None:
        module.dense_loss(batch(step, 0, place.data_rank)[0]).backward()
        module.expert_loss(*batch(0, step, 0)).backward()
        engine.finish_step()

    def run(rank: int) -> None:
        place = Topology(1, 2, 1, rank)
        first = Stage(0, 0, EXPERTS)
        engine = OptimizerEngine(first, run_config(place), place)
        for step in range(2):
            step_once(engine, first, place, step)
        second = Stage(7, 0, EXPERTS)
        resumed = OptimizerEngine(second, run_config(place), place)
        for theirs, ours in zip(resumed.partitions(), engine.partitions(), strict=True):
            assert theirs.fragments == ours.fragments
            theirs.master.copy_(ours.master)
            theirs.first_moment.copy_(ours.first_moment)
            theirs.second_moment.copy_(ours.second_moment)
        resumed.continue_from(num_steps=2, num_updates=engine.num_updates)
        for step in range(2, 4):
            step_once(engine, first, place, step)
            step_once(resumed, second, place, step)
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    run_ranks(2, run)


def test_partitions_hold_everything_once() -> None:
    # Oracle: the whole masters, gathered by the optimizer's own collectives.
    def run(rank: int) -> tuple[int, dict[str, torch.Tensor], list[Any]]:
        place = Topology(1, 4, 2, rank)
        module = Stage(0, 2 * place.expert_rank, 2)
        engine = OptimizerEngine(module, run_config(place), place)
        whole = {name: entry.master for name, entry in engine.export_state().parameters.items()}
        pieces = [
            (piece, piece.of(partition.master))
            for partition in engine.partitions()
            for piece in partition.fragments
        ]
        return place.expert_rank, whole, pieces

    seen: dict[tuple[int, str], torch.Tensor] = {}
    for expert_rank, whole, pieces in run_ranks(4, run):
        for piece, values in pieces:
            # Dense parameters are cut over all ranks, experts over those with the same ones.
            key = (expert_rank if piece.name == "experts" else 0, piece.name)
            count = seen.setdefault(key, torch.zeros(piece.shape, dtype=torch.int64))
            count.flatten()[piece.start : piece.stop] += 1
            assert torch.equal(whole[piece.name].flatten()[piece.start : piece.stop], values)
    assert {name for _, name in seen} == set(whole)
    assert all(bool((count == 1).all()) for count in seen.values())


def test_a_loss_that_is_not_finite_skips_the_step_everywhere() -> None:
    # Oracle: the weights before; the gradient itself is finite.
    def run(rank: int) -> tuple[bool, bool, bool]:
        place = Topology(2, 1, 1, rank)
        module = Stage(rank, 0, EXPERTS)
        engine = OptimizerEngine(module, run_config(place), place)
        before = module.weight.detach().clone()
        module.dense_loss(batch(0, 0, 0)[0]).backward()
        losses = [torch.tensor(1.0), torch.tensor(float("nan"))] if rank == 1 else []
        outcome = engine.finish_step(losses)
        assert torch.equal(before, module.weight.detach())
        assert engine.num_updates == 0
        module.dense_loss(batch(1, 0, 0)[0]).backward()
        return outcome.applied, outcome.losses_finite, engine.finish_step().applied

    assert run_ranks(2, run) == [(False, False, True)] * 2


def test_replicas_that_differ_are_named() -> None:
    # Oracle: the two ranks that were built from different seeds.
    def run(rank: int) -> None:
        place = Topology(1, 2, 1, rank)
        OptimizerEngine(Stage(rank, 0, EXPERTS), run_config(place), place)

    with pytest.raises(RankFailedError, match=r"rank 1 and rank 0 start with different weights in dense"):
        run_ranks(2, run)


def test_a_gradient_after_reduction_is_refused() -> None:
    # Oracle: our own promise; the gradient would be lost without a word.
    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        module = Stage(0, 0, EXPERTS)
        engine = OptimizerEngine(module, run_config(place), place)
        engine.reduce_gradients()
        with pytest.raises(AssertionError, match="after reduce_gradients"):
            module.dense_loss(batch(0, 0, 0)[0]).backward()

    run_ranks(1, run)


def test_small_bf16_gradients_are_summed_in_fp32() -> None:
    # Oracle: exact arithmetic; a bf16 sum would stop at 1.0, and p.grad would lose deferred gradients.
    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        module = Stage(0, 0, EXPERTS)
        config = run_config(place, train={"precision": "bf16"})
        engine = OptimizerEngine(module, config, place)
        assert module.weight.dtype == torch.bfloat16
        assert module.gain.dtype == torch.float32
        weight = module.weight
        weight.gradient_sum().add_(torch.ones_like(weight))  # type: ignore[attr-defined]
        for _ in range(64):
            weight.gradient_sum().add_(torch.full_like(weight, 2.0**-10))  # type: ignore[attr-defined]
        assert torch.equal(engine.main_gradient(weight), torch.full((WIDTH, WIDTH), 1 + 64 * 2.0**-10))
        assert weight.grad is None

    run_ranks(1, run)


def test_a_saved_parameter_still_knows_its_sink() -> None:
    # Oracle: the closed form; linear layers reach the sink through ctx.saved_tensors.
    class Deferred(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, queue: list[Any]) -> Tensor:
            ctx.save_for_backward(x, weight)
            ctx.queue = queue
            return x @ weight

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            x, weight = ctx.saved_tensors
            ctx.queue.append(lambda: weight.gradient_sum().add_(x.detach().t() @ gradient))
            return gradient @ weight.t(), None, None

    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        module = Stage(0, 0, EXPERTS)
        engine = OptimizerEngine(module, run_config(place), place)
        queue: list[Any] = []
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        Deferred.apply(x, module.weight, queue).sum().backward()
        assert not engine.main_gradient(module.weight).any()
        queue[0]()
        expected = x.detach().sum(0)[:, None].expand(WIDTH, WIDTH)
        torch.testing.assert_close(engine.main_gradient(module.weight), expected)

    run_ranks(1, run)


def test_a_step_tells_what_its_reduction_sent() -> None:
    # Oracle: by hand: of each flat buffer, fp32, a rank of two sends the half that is not its own.
    def run(rank: int) -> None:
        place = Topology(1, 2, 1, rank)
        engine = OptimizerEngine(Stage(0, 0, EXPERTS), run_config(place), place)
        engine.reduce_gradients()
        reduction = engine.finish_step().reduction
        flat = engine._optimizer.fp32_groups_gradients_flat
        assert reduction.num_bytes == sum(buffer.numel() // 2 * 4 for buffer in flat)
        assert 0.0 <= reduction.exposed_seconds <= reduction.seconds

    run_ranks(2, run)


def test_monitors_receive_figures(tmp_path: Path) -> None:
    # Oracle: the CSV file DeepSpeed's monitor writes.
    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        deepspeed = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
        engine = OptimizerEngine(Stage(0, 0, EXPERTS), run_config(place, deepspeed=deepspeed), place)
        engine.write_monitors({"Train/loss": 2.5}, step=3)

    run_ranks(1, run)
    (written,) = tmp_path.rglob("*loss*.csv")
    assert written.read_text().splitlines()[-1].split(",") == ["3", "2.5"]


def test_a_refused_option_stops_the_engine() -> None:
    # Oracle: the message of `check_config`, here from the engine itself.
    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        config = run_config(place).model_copy(update={"deepspeed": {"zero_optimization": {"stage": 2}}})
        with pytest.raises(ValueError, match=r"zero_optimization.stage=2.*Set it to 1"):
            OptimizerEngine(Stage(0, 0, EXPERTS), config, place)

    run_ranks(1, run)


def test_the_module_is_left_alone() -> None:
    # Oracle: a module's own registers; DeepSpeed's forward hooks would count and scale behind our back.
    def run(rank: int) -> None:
        place = Topology(1, 1, 1)
        module = Stage(0, 0, EXPERTS)
        engine = OptimizerEngine(module, run_config(place), place)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        engine.close()

    run_ranks(1, run)


def test_starting_is_quiet_and_compiles_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # Oracle: an empty screen, and DeepSpeed's switch for its shared-memory op (a minute's compilation).
    def run(rank: int) -> None:
        place = Topology(1, 2, 2, rank)
        engine = OptimizerEngine(Stage(0, rank * 2, 2), run_config(place), place)
        engine.finish_step()
        assert not compatible_ops["deepspeed_shm_comm"]
        assert deepspeed_comm.cdb.shm_comm_op is None

    run_ranks(2, run)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_missing_private_attribute_is_named() -> None:
    # Oracle: a stand-in for a DeepSpeed that renamed something.
    class Renamed:
        kept = 1

    check_contract()
    with pytest.raises(RuntimeError, match=r"0\.19\.8 lacks Renamed\.lost, .* Install deepspeed==0\.19\.8"):
        check_contract(((Renamed, ("kept", "lost")),))
