"""Whole runs in which something breaks between ranks: who is named, in which action, with which exit code.

Oracle: the rank and the action that the test breaks; the exit codes in the README; for unusual routing, the
same run on a single process.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mhc_dist.train
from mhc_dist import train
from mhc_dist.config import RunConfig
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.guard.watch_limits import WatchLimits
from mhc_dist.model.moe import Router
from mhc_dist.observe.run_log import LOG_FILE, read_log
from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.executor import _Run
from mhc_dist.pipeline.streams import Flight, HostStreams
from mhc_dist.plan.run_programs import RunPrograms, plan_run
from tests.multi_rank.forked_run import END_SECONDS, ForkedRun, run_to_end, write_corpus
from tests.small import small_config

TIMEOUT_SECONDS = 6.0
"""Of the run that gets stuck. The others end without a clock, and must not be stopped by one."""
STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def run_config(folder: Path, corpus: Path, sizes: tuple[int, int, int], **sections: Any) -> RunConfig:
    pipeline, data, expert = sizes
    return small_config(
        model={"num_layers": 3, "vocab_size": 256, **sections.pop("model", {})},
        parallel={"pipeline": pipeline, "data": data, "expert": expert},
        schedule={"name": "1f1b", "num_microbatches": 4 // data, **sections.pop("schedule", {})},
        data={"corpus": str(corpus)},
        train={
            "name": "run",
            "output": str(folder),
            "steps": sections.pop("steps", STEPS),
            "backend": "gloo",
            "validate_every": 0,
            "validation_batches": 1,
            "timeout_seconds": sections.pop("timeout_seconds", 60.0),
        },
        observe={"metrics_port": 0},
        **sections,
    )


def die_in(lane: str) -> Callable[[int], None]:
    """Rank 1 is killed while one of its transfers on `lane` is under way, once it has told how it fares."""

    def prepare(rank: int) -> None:
        if rank != 1:
            return
        real = HostStreams.transfer
        first: float | None = None

        def transfer(self: HostStreams, on: str, start: Any, buffers: Any) -> Flight:
            nonlocal first
            flight = real(self, on, start, buffers)
            first = first or time.monotonic()
            if on == lane and time.monotonic() - first > 4 * WatchLimits().heartbeat_seconds:
                os.kill(os.getpid(), signal.SIGKILL)
            return flight

        HostStreams.transfer = transfer  # type: ignore[method-assign]

    return prepare


# The survivor need not be in the dead rank's pass: what that one sent before may have let it go on.
EXCHANGING = r"(issue|wait)\.[FB] c[01] m\d (counts|dispatch|combine)\.\d(, waiting for tokens of rank 1)?"
PLACED: dict[str, dict[str, Any]] = {
    "schedule": {"name": "dualpipev", "cluster": "laptop"},
    "recompute": {"mode": "mhc"},
}
"""Two chunks on a rank, passes in pairs, recomputation and weight gradients between their exchanges."""


@pytest.mark.parametrize(
    ("sizes", "lane", "waiting", "sections"),
    [
        ((1, 2, 2), "exchange F", EXCHANGING, {}),
        ((1, 2, 2), "exchange B", EXCHANGING, PLACED),
        # Rank 0 may have the message already, and be anywhere between what needs it and what needs the next.
        ((2, 1, 1), "message 1>0", r"\S.*", {}),
    ],
    ids=["forward exchange", "backward exchange, placed", "message"],
)
def test_a_rank_killed_in_the_middle_of_a_transfer_is_named(
    sizes: tuple[int, int, int],
    lane: str,
    waiting: str,
    sections: dict[str, dict[str, Any]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    """The dead rank's last action is as old as its last heartbeat; what the survivor waits in is exact."""
    config = run_config(tmp_path, corpus, sizes, steps=100_000, **sections)
    run = ForkedRun(config, prepare=die_in(lane))
    codes = run.wait()  # which does not wait for the run's own timeout
    output = run.output.read_text()
    assert codes == [ExitCode.PEER_DIED, -signal.SIGKILL], output
    (line,) = re.findall(r"^\[rank 0\] rank 1 .*$", output, re.MULTILINE)
    assert re.search(r"died: its process is gone\. Last known action: .+, begun \d+\.\d s ago", line), line
    assert re.search(rf"This rank was in ({waiting}|step.*) for \d+\.\d", line), line
    assert "Traceback" not in output, output


@pytest.mark.parametrize(
    ("kind", "item", "direction"),
    [
        (ActionKind.REDUCE, "", None),
        pytest.param(ActionKind.ISSUE, "counts", Pass.FORWARD, marks=pytest.mark.long),
        pytest.param(ActionKind.ISSUE, "combine", Pass.BACKWARD, marks=pytest.mark.long),
        pytest.param(ActionKind.SEND, "", Pass.FORWARD, marks=pytest.mark.long),
        pytest.param(ActionKind.STEP, "", None, marks=pytest.mark.long),
    ],
    ids=["reduction", "counts", "backward combine", "send", "step"],
)
def test_a_rank_that_dies_before_an_action_is_named_by_all_others(
    kind: ActionKind, item: str, direction: Pass | None, corpus: Path, tmp_path: Path
) -> None:
    """Its expert peer, its pipeline neighbours and who is neither: all end with the same code, each with its
    own action; of the dead rank they know its last heartbeat. Of a reduction no survivor has all it needs.
    """
    victim = 3

    def prepare(rank: int) -> None:
        if rank != victim:
            return
        real, first = _Run.do, None

        def do(self: _Run, action: Action) -> Any:
            nonlocal first
            first = first or time.monotonic()
            hit = action.kind is kind and action.item.startswith(item) and action.direction is direction
            if hit and time.monotonic() - first > 4 * WatchLimits().heartbeat_seconds:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, action)

        _Run.do = do  # type: ignore[method-assign]

    schedule = {"name": "dualpipev", "num_microbatches": 4}
    config = run_config(
        tmp_path, corpus, (2, 2, 2), steps=100_000, schedule=schedule, model={"num_layers": 4}
    )
    run = ForkedRun(config, prepare=prepare)
    codes = run.wait()
    output = run.output.read_text()
    assert codes == [*[ExitCode.PEER_DIED] * victim, -signal.SIGKILL], output
    told = re.findall(
        r"^\[rank (\d)\] rank 3 \(.*\) died: its process is gone\. Last known action: (.+), begun \d+\.\d s"
        r" ago\. This rank was in (.+) for \d+\.\d s\.",
        output,
        re.MULTILINE,
    )
    assert sorted(rank for rank, _, _ in told) == ["0", "1", "2"], output
    if kind is ActionKind.REDUCE:
        for rank, _, action in told:
            others = ", ".join(sorted({"0", "1", "2", "3"} - {rank}))
            assert action == f"step, waiting for gradients of ranks {others}", output
    assert "Traceback" not in output, output


class NeverOver:
    """The flight of a transfer that a link has swallowed."""

    def land(self) -> None:
        while True:
            time.sleep(1.0)

    release = land


def stall(lane: str) -> Callable[[int], None]:
    """Rank 1's third transfer on `lane` never begins: what it sends does not arrive, nor does it end."""

    def prepare(rank: int) -> None:
        if rank != 1:
            return
        real, seen = HostStreams.transfer, 0

        def transfer(self: HostStreams, on: str, start: Any, buffers: Any) -> Flight:
            nonlocal seen
            seen += on == lane
            return NeverOver() if on == lane and seen == 3 else real(self, on, start, buffers)

        HostStreams.transfer = transfer  # type: ignore[method-assign]

    return prepare


def freeze(rank: int) -> None:
    """Rank 1 is stopped as it would tell its experts' counts, and neither dies nor goes on."""
    if rank != 1:
        return
    real, seen = _Run.do, 0

    def do(self: _Run, action: Action) -> Any:
        nonlocal seen
        seen += action.kind is ActionKind.ISSUE and action.item.startswith("counts")
        if seen == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(self, action)

    _Run.do = do  # type: ignore[method-assign]


STALLS: list[tuple[tuple[int, int, int], str, dict[int, str]]] = [
    (
        (1, 2, 2),
        "exchange F",
        {
            0: r"wait\.[FB] c0 m\d \S+, waiting for tokens of rank 1",
            1: r"wait\.[FB] c0 m\d \S+, waiting for tokens of rank 0",
        },
    ),
    (
        (2, 1, 1),
        "message 1>0",
        {
            0: r"arrive\.B c0 m2 rank1, waiting for gradients from rank 1",
            1: r"send\.B c1 m3 rank0",  # the next one, which waits until the link is free
        },
    ),
]
"""Layout, what rank 1 sends on, and each rank's action that cannot do without it."""


def test_a_link_that_stalls_ends_the_run_with_the_action_that_waits(corpus: Path, tmp_path: Path) -> None:
    """A link that never delivers what rank 1 sends: an exchange of a run, and a message of another one. And
    a rank that is frozen in the middle of an exchange, which its peer's transfer would give up on by itself.
    """
    runs = []
    for sizes, lane, _ in STALLS:  # side by side, since they do little but wait
        config = run_config(tmp_path / lane, corpus, sizes, timeout_seconds=TIMEOUT_SECONDS)
        runs.append(ForkedRun(config, prepare=stall(lane)))
    frozen = ForkedRun(
        run_config(tmp_path / "frozen", corpus, (1, 2, 2), timeout_seconds=TIMEOUT_SECONDS), prepare=freeze
    )
    for run, (_, _, doing) in zip(runs, STALLS, strict=True):
        codes = run.wait()
        output = run.output.read_text()
        assert codes == [ExitCode.STUCK, ExitCode.STUCK], output
        stuck = re.search(r"no progress: rank (\d) has been in (.+?) for (\d+\.\d) s,", output)
        assert stuck, output
        assert re.fullmatch(doing[int(stuck[1])], stuck[2]), output
        assert TIMEOUT_SECONDS <= float(stuck[3]) < TIMEOUT_SECONDS + 30.0  # it looks five times a second
        for rank, action in doing.items():
            assert re.search(rf"rank {rank} \(.*\): {action} for", output), output
    # Not the transfer's own limit, which would have made the rank that waits the one that failed.
    frozen.ranks[0].join(END_SECONDS)
    frozen.kill(1)
    output = frozen.output.read_text()
    assert frozen.wait() == [ExitCode.STUCK, -signal.SIGKILL], output
    assert re.search(
        r"no progress: rank 0 has been in \S+ c0 m\d .*, waiting for tokens of rank 1", output
    ), output
    assert "Traceback" not in output, output


def test_programs_that_differ_are_refused_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        def other_program(config: RunConfig) -> RunPrograms:
            programs = plan_run(config)
            first, second, *rest = programs.training.actions[0]
            swapped = replace(programs.training, actions=((second, first, *rest),))
            return programs._replace(training=swapped)

        if rank == 1:
            mhc_dist.train.plan_run = other_program

    config = run_config(tmp_path, corpus, (1, 2, 2))
    run = ForkedRun(config, prepare=prepare)
    codes = run.wait()
    output = run.output.read_text()
    # A rank so slow that it finds its peer gone before it has told its own error says that instead.
    assert ExitCode.USAGE in codes, output
    assert set(codes) <= {ExitCode.USAGE, ExitCode.PEER_DIED}, output
    failure = (config.folder / "failure.json").read_text()
    for part in ("ranks disagree on the program of a step", "Start all of them with the same"):
        assert part in failure, (failure, output)
    assert not (config.folder / LOG_FILE).exists(), "no step was made"


def crowd(experts: tuple[int, ...]) -> Callable[[int], None]:
    """Every router sends every token to `experts`, whatever balancing does."""

    def prepare(rank: int) -> None:
        real = Router.__init__

        def __init__(self: Router, *arguments: Any) -> None:  # noqa: N807
            real(self, *arguments)
            self.bias_E[list(experts)] = 100.0

        Router.__init__ = __init__  # type: ignore[method-assign]

    return prepare


def losses(config: RunConfig) -> list[float]:
    return [record["loss"] for record in read_log(config.folder)]  # type: ignore[misc]


@pytest.mark.parametrize("experts", [(0,), (6, 7)], ids=["one expert gets all", "rank 0 gets nothing"])
def test_any_routing_trains_as_a_single_process_does(
    experts: tuple[int, ...], corpus: Path, tmp_path: Path
) -> None:
    model = {"num_active_experts": len(experts)}
    alone = run_config(tmp_path / "alone", corpus, (1, 1, 1), model=dict(model))
    run_to_end(alone, prepare=crowd(experts))
    spread = run_config(tmp_path / "spread", corpus, (1, 2, 2), model=dict(model))
    run_to_end(spread, prepare=crowd(experts))
    assert len(losses(spread)) == STEPS
    torch.testing.assert_close(losses(spread), losses(alone), rtol=1e-6, atol=0.0)


def test_a_defect_in_a_step_is_no_mistake_of_the_user(corpus: Path, tmp_path: Path) -> None:
    """Oracle: exit code 1 and a traceback; code 2 with one sentence is for what a user wrote."""

    def prepare(rank: int) -> None:
        def broken(*arguments: Any) -> None:
            raise ValueError("too many values to unpack")

        train.train_step = broken

    run = ForkedRun(run_config(tmp_path, corpus, (1, 1, 1)), prepare=prepare)
    assert run.wait() == [ExitCode.ERROR]
    output = run.output.read_text()
    assert "Traceback" in output
    assert "while training: too many values to unpack" in output
