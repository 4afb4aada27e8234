"""The checks that wait for a GPU, in the interpreter: right kernels pass them, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from mhc_kernels import gpu_check, interpreted, tiles
from mhc_kernels.gpu import experts, parity, running
from mhc_kernels.gpu.plan import REHEARSAL, Case, Plan
from mhc_kernels.gpu.problem import Problem, relative_error
from mhc_kernels.launch import forward, recompute
from mhc_kernels.seam import ConnectionSpec, make_backend

pytestmark = pytest.mark.usefixtures("poisoned")

BF16 = torch.bfloat16
CASE = REHEARSAL.cases[0]
PLAN = REHEARSAL._replace(chunked_cases=REHEARSAL.cases, num_tokens=9)
QUICK = REHEARSAL._replace(dtypes=(BF16,), num_tokens=5, chunked_cases=(), experts=(6, 16), timed_channels=())
DEVICE_ONLY = {
    "fp32 sums of bf16 products",
    "urgent stream",
    "a host that never waits",
    "another device",
}
COMPILES = "torch.compile around a seam"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plan", [QUICK, pytest.param(PLAN, marks=pytest.mark.long)], ids=["quick", "all"])
def test_right_kernels_pass(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the other tests of this folder, which these kernels pass."""
    monkeypatch.setattr(tiles, "chunk_tokens", lambda *_: 64)
    named = gpu_check.checks(plan)
    outcomes = {name: check(plan) for name, check in named.items() if name != COMPILES}
    assert {name: o.reason for name, o in outcomes.items() if o.passed is False} == {}
    assert {name for name, outcome in outcomes.items() if outcome.passed is None} == DEVICE_ONLY
    if plan.timed_channels:
        times = outcomes["times, C=32"].figures
        assert all(times[f"{name}_ms"] > 0 for name in ("triton_forward", "chunked_both", "recompute_3"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_compiled_function_around_a_seam_passes() -> None:
    """Oracle: the same function without a compiler."""
    assert gpu_check.checks(PLAN)[COMPILES](PLAN).passed


def changed(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def test_wrong_kernels_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: kernels with one defect each: the reason names what is wrong."""
    right_forward, right_block = forward.seam_forward, recompute.recompute_block
    drift = iter(range(100))

    def short() -> str:
        outcome = parity.parity(CASE, BF16, QUICK)
        assert not outcome.passed
        return outcome.reason

    monkeypatch.setattr(
        recompute,
        "recompute_block",
        changed(right_block, lambda made: [m._replace(h_TC=-m.h_TC) for m in made]),
    )
    assert short() == "recomputed h differ from the forward's"
    monkeypatch.setattr(recompute, "recompute_block", right_block)
    monkeypatch.setattr(
        forward,
        "seam_forward",
        changed(right_forward, lambda made: made._replace(post_TN=made.post_TN * 1.01)),
    )
    assert "post is off by 1.0e-02, allowed is 2.0e-03" in short()
    monkeypatch.setattr(
        forward,
        "seam_forward",
        changed(right_forward, lambda made: made._replace(post_TN=made.post_TN + 1e-6 * next(drift))),
    )
    assert "post differs from run to run" in short()
    monkeypatch.setattr(
        forward,
        "seam_forward",
        changed(right_forward, lambda made: made._replace(h_TC=made.h_TC.nan_to_num(0, 0, 0))),
    )
    assert "a token that is not finite looks finite" in parity.not_finite(QUICK).reason


@pytest.mark.timeout(300)
@pytest.mark.parametrize("n", [4, pytest.param(8, marks=pytest.mark.long)])
def test_a_matrix_unit_stays_within_half_the_limits(n: int) -> None:
    """Oracle: the fp64 reference, with operands of products cut to the 11 bits that matrix units read and
    results rounded to bf16. Where the rounding of the streams alone costs more, the reference in bf16."""
    problem = Problem(Case(ConnectionSpec(num_streams=n), 256), 33, BF16, "cpu")
    with interpreted.products_like_a_matrix_unit():
        ours = problem.both_ways(make_backend("triton"))
    exact = problem.widened().both_ways(make_backend("reference"))
    plain = problem.both_ways(make_backend("reference"))
    errors = {name: relative_error(value, exact[name]) for name, value in ours.items()}
    assert errors["d alpha"] != relative_error(plain["d alpha"], exact["d alpha"])
    half = {
        name: max(parity.limit(name, BF16) / 2, 1.5 * relative_error(value, exact[name]))
        for name, value in plain.items()
    }
    assert {name: error for name, error in errors.items() if not error <= half[name]} == {}


class PlayedGpu:
    """What the checks ask torch.cuda for, and one stream in every role. `waits`: whether work on an urgent
    stream waits for the default one, which is idle then."""

    def __init__(self, *, waits: bool) -> None:
        self._idle = waits
        self.modes: list[str] = []

    def is_available(self) -> bool:
        return True

    def default_stream(self) -> PlayedGpu:
        return self

    def Stream(self, priority: int) -> PlayedGpu:  # noqa: N802
        assert priority < 0
        return self

    def query(self) -> bool:
        return self._idle

    def synchronize(self) -> None: ...

    def _sleep(self, cycles: int) -> None: ...

    def stream(self, _: PlayedGpu) -> AbstractContextManager[None]:
        return nullcontext()

    def device_of(self, _: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext()

    def set_sync_debug_mode(self, mode: str) -> None:
        self.modes.append(mode)


def playing(gpu: PlayedGpu) -> Any:
    return mock.patch.object(torch, "cuda", gpu)


def test_streams_that_wait_are_noticed() -> None:
    """Oracle: a GPU that is played: its default stream is busy when the urgent one has ended, or not."""
    plan = PLAN._replace(num_tokens=3)
    for waits in (False, True):
        with playing(PlayedGpu(waits=waits)):
            outcome = running.side_stream(plan)
        assert outcome.passed is not waits
        assert outcome.reason == ("work on the urgent stream waited for the default stream" if waits else "")


def test_the_mode_in_which_waiting_raises_is_left_again() -> None:
    """Oracle: the order of modes, also when the host did wait."""
    gpu = PlayedGpu(waits=False)
    with playing(gpu):
        assert running.host_never_waits(PLAN._replace(num_tokens=3)).passed
    assert gpu.modes == ["error", "default"]
    refuse = mock.Mock(side_effect=[{}, RuntimeError("called a synchronizing CUDA operation")])
    with (
        playing(gpu),
        mock.patch.object(Problem, "both_ways", refuse),
        pytest.raises(RuntimeError, match="CUDA"),
    ):
        running.host_never_waits(PLAN)
    assert gpu.modes == 2 * ["error", "default"]


def test_sums_that_are_rounded_are_noticed() -> None:
    """Oracle: torch's product in fp64, added in fp32, or rounded to bf16 before."""

    def addmm(middle: torch.dtype, into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **_: Any) -> None:
        into += (a.double() @ b.double()).to(middle)

    plan: Plan = PLAN._replace(experts=(40, 16))
    for middle, passed in ((torch.float32, True), (torch.bfloat16, False)):
        with playing(PlayedGpu(waits=False)), mock.patch.object(torch, "addmm", partial(addmm, middle)):
            outcome = experts.sums_in_fp32(plan)
        assert outcome.passed is passed, outcome
