"""What a rank waits for, on real ranks whose clocks agree because they share a host."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tests.multi_rank.pipeline_case as case
from mhc_dist.config import RunConfig
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.wire_times import measure_wires, wire_through
from mhc_dist.pipeline.action import Action, ActionKind
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.perfetto import read_about, read_events
from mhc_dist.pipeline.trace import Event, StepPhase, Trace, awaited_action
from mhc_dist.pipeline.wire import MeasuredWires
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import calibration_from_trace
from mhc_dist.plan.run_programs import plan_run
from mhc_dist.topology import Topology
from mhc_dist.worker import Worker
from tests.multi_rank.forked_run import run_to_end, write_corpus
from tests.multi_rank.harness import run_ranks
from tests.small import small_config

SLOW_SECONDS = 0.04
LATE_SECONDS = 0.5


class Traced(NamedTuple):
    trace: Trace
    wires: MeasuredWires
    seconds: float
    """By a clock around the executor."""


def traced_step(rank: int, config: RunConfig, slow_rank: int) -> Traced:
    """A step in which every forward phase of `slow_rank` takes SLOW_SECONDS longer."""
    topology = Topology(config.parallel.pipeline, config.parallel.data, config.parallel.expert, rank)
    program = case.make_program(config)
    groups = ProcessGroups.build(topology, links=program.links)
    stage = case.build_stage(config, program, topology, groups)
    transport = case.make_transport(config, topology, groups)
    wires = measure_wires(
        groups.channels, [groups.expert_forward], rank, transport.message_bytes, 4096, torch.device("cpu")
    )

    def stretch(action: Action, start: float) -> None:
        if rank == slow_rank and action.kind is ActionKind.COMPUTE:
            time.sleep(SLOW_SECONDS)

    executor = Executor(topology.pipeline_rank, stage.by_index, transport, stretch=stretch, wires=wires)
    microbatches = case.own_microbatches(config, topology)
    executor.run(program, microbatches, case.NoStep())  # the first run pays for what later ones find ready
    torch.distributed.barrier()
    start = time.perf_counter()
    trace = executor.run(program, microbatches, case.NoStep()).trace
    return Traced(trace, wires, time.perf_counter() - start)


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"pipeline": 2, "data": 1, "expert": 1}, ActionKind.ARRIVE),
        ({"pipeline": 1, "data": 2, "expert": 2}, ActionKind.WAIT),
    ],
    ids=["pipeline", "experts"],
)
def test_waiting_for_a_slow_rank_is_bubble(sizes: dict[str, int], kind: ActionKind) -> None:
    """Oracle: when the slow rank itself began to send what the other one awaited. The clocks are one clock.

    A rank does not see that time. It takes a wait's last wire time for the wire, so what it calls starved is
    at least the truth less one wire time, and at most the whole wait.
    """
    config = small_config(
        model={"num_layers": 4, "num_dense_layers": 0},
        parallel=sizes,
        schedule={"name": "1f1b", "num_microbatches": 4},
    )
    slow, fast = run_ranks(2, traced_step, config, 0)
    begun = {
        replace(event.action, peer=None): event.start
        for event in slow.trace.events
        if event.action.kind in (ActionKind.SEND, ActionKind.ISSUE)
    }
    truth = 0.0
    for event in fast.trace.events:
        if event.action.kind is not kind:
            continue
        awaited = awaited_action(event.action)
        assert awaited is not None
        starved = max(0.0, min(begun[awaited], event.end) - event.start)
        wire = event.seconds - event.starved if event.starved else event.blocked
        assert event.starved >= starved - wire - 1e-9
        assert event.starved + event.blocked == pytest.approx(event.seconds)
        truth += starved
    assert truth > 3 * SLOW_SECONDS, "the test did not make anyone wait"
    # No upper bound: where the ranks' cores are busy the wire itself takes longer than it was measured to.
    bubble = fast.trace.phase_seconds()[StepPhase.BUBBLE]
    assert bubble > 0.7 * truth
    assert bubble > slow.trace.phase_seconds()[StepPhase.BUBBLE]


def test_phases_add_up_to_wall_time_on_every_rank() -> None:
    """Oracle: a clock around the executor. Actions follow each other almost without gaps."""
    config = small_config(
        model={"num_layers": 4, "num_dense_layers": 0},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": "dualpipev", "num_microbatches": 4},
    )
    for traced in run_ranks(4, traced_step, config, 0):
        phases = traced.trace.phase_seconds()
        # A process that is not scheduled for a moment may lose it outside of the executor.
        assert sum(phases.values()) == pytest.approx(traced.seconds, rel=0.01, abs=0.02)
        assert all(seconds >= 0 for seconds in phases.values())
        assert phases[StepPhase.OTHER] < 0.1 * traced.seconds
        bubbles = sum(event.starved for event in traced.trace.events)
        assert phases[StepPhase.BUBBLE] == pytest.approx(bubbles)
        arrived = [e.payload_bytes for e in traced.trace.events if e.action.kind is ActionKind.ARRIVE]
        tokens, streams, width = 12, 4, 32
        assert set(arrived) == {tokens * streams * width * 4}


def measured(rank: int) -> MeasuredWires:
    topology = Topology(4, 2, 2, rank)
    # The links of a ring as well as of a line: rank 3 also talks to rank 0.
    links = [(a, b) for a in range(4) for b in ((a + 1) % 4, (a - 1) % 4)]
    groups = ProcessGroups.build(topology, links=links)
    experts = [groups.expert_forward, groups.expert_backward]
    return measure_wires(groups.channels, experts, rank, 1 << 20, 1 << 20, torch.device("cpu"))


def test_links_in_a_ring_are_measured_without_a_deadlock() -> None:
    """Oracle: wires that more bytes keep longer, on ranks of which every one has two neighbours."""
    for wires in run_ranks(8, measured):
        for seconds in (wires.message_seconds, wires.exchange_seconds):
            assert 0 <= seconds(0) <= seconds(1 << 20)
            assert 1e-6 < seconds(1 << 20) < 10


def test_line_through_two_times() -> None:
    """Oracle: points on a known line; and a noisy pair in which more bytes were faster."""
    wire = wire_through({1000: 2e-3, 11000: 7e-3})
    assert wire.seconds_per_byte == pytest.approx(5e-7)
    assert wire.latency_seconds == pytest.approx(1.5e-3)
    noisy = wire_through({1000: 3e-3, 11000: 2e-3})
    assert (noisy.latency_seconds, noisy.seconds_per_byte) == (2e-3, 0.0)


def be_late(rank: int) -> None:
    """Rank 1 comes to the end of each step LATE_SECONDS after the others."""
    real = Worker.reduce

    def reduce(self: Worker) -> None:
        if rank == 1:
            time.sleep(LATE_SECONDS)
        real(self)

    Worker.reduce = reduce  # type: ignore[method-assign]


def test_a_run_writes_the_steps_it_was_asked_for(tmp_path: Path) -> None:
    """Oracle: the run's own program, rank by rank; the delay that rank 1 is given."""
    config = small_config(
        model={"num_layers": 3, "vocab_size": 256},
        parallel={"pipeline": 2, "data": 2, "expert": 2},
        schedule={"name": "1f1b", "num_microbatches": 2},
        data={"corpus": str(write_corpus(tmp_path / "text"))},
        train={
            "name": "run",
            "output": str(tmp_path),
            "steps": 3,
            "backend": "gloo",
            "validate_every": 0,
            "validation_batches": 1,
        },
        observe={"metrics_port": 0, "trace_steps": [2]},
    )
    run_to_end(config, prepare=be_late)
    folder = config.folder / "trace"
    assert sorted(path.name for path in folder.iterdir()) == ["step_2", "step_2.json"]
    merged = read_events(folder / "step_2.json")
    program = plan_run(config).training
    for rank in range(4):
        path = folder / "step_2" / f"rank_{rank}.json"
        events, about = read_events(path), read_about(path)
        assert (about["step"], about["rank"], about["data_rank"]) == (2, rank, rank % 2)
        assert tuple(event.action for event in events) == program.actions[rank // 2]
        own = [event for event in merged if event.rank == rank]
        assert [(e.action, e.column) for e in own] == [(e.action, e.column) for e in events]
        assert [e.start for e in own] == pytest.approx([e.start for e in events], abs=1e-6)
        trace = Trace([Event(e.action, e.start, e.end, 0, e.blocked, e.starved) for e in events])
        assert sum(trace.phase_seconds().values()) == pytest.approx(about["seconds"], rel=0.01, abs=0.02)
        (end,) = [event for event in events if event.action.kind is ActionKind.STEP]
        # The last one to come hardly waits. Its neighbour over data waits for its gradients instead.
        assert (end.starved > 0.5 * LATE_SECONDS) == (rank in (2, 3)), (rank, end)
    machine = Machine(load_cluster("laptop"))
    calibrated = calibration_from_trace(config, machine, folder / "step_2.json")
    assert calibrated != Machine(load_cluster("laptop")).calibration
