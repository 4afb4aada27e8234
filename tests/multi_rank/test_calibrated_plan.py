"""A real run writes its trace, the trace calibrates the planner, and the simulated step is the real one."""

from __future__ import annotations

from math import log
from pathlib import Path

import pytest

import tests.multi_rank.pipeline_case as case
from mhc_dist.config import RunConfig
from mhc_dist.observe.step_traces import StepTraces
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.pipeline.executor import Executor
from mhc_dist.pipeline.simulate import Simulation
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import calibration_from_trace, run_costs
from mhc_dist.topology import Topology
from tests.multi_rank.harness import run_ranks
from tests.small import small_config

WARM_UP, STEPS = 1, 4


def traced_run(rank: int, config: RunConfig, folder: Path) -> list[float]:
    """Steps of the executor on this rank, all traced but the warm-up; returns the seconds of those."""
    sizes = config.parallel
    topology = Topology(sizes.pipeline, sizes.data, sizes.expert, rank)
    program = case.make_program(config)
    groups = ProcessGroups.build(topology, links=program.links)
    stage = case.build_stage(config, program, topology, groups)
    transport = case.make_transport(config, topology, groups)
    executor = Executor(topology.pipeline_rank, stage.by_index, transport)
    traces = StepTraces(folder, range(WARM_UP + 1, STEPS + 1), topology)
    seconds = []
    for step in range(1, STEPS + 1):
        output = executor.run(program, case.own_microbatches(config, topology), case.NoStep())
        traces.write(step, output.trace, config.tokens_per_step)
        seconds.append(output.trace.seconds)
    if rank == 0:
        traces.merge()
    return seconds[WARM_UP:]


@pytest.mark.parametrize(
    ("schedule", "pipeline", "data"), [("1f1b", 2, 1), ("dualpipev", 1, 2)], ids=["messages", "exchanges"]
)
def test_a_calibrated_simulation_takes_as_long_as_the_run(
    schedule: str, pipeline: int, data: int, tmp_path: Path
) -> None:
    """Oracle: the clock of the run itself. The fastest step, which the rest of the machine disturbed least,
    and the trace of that very step: they agree within a factor of 1.6, quiet or busy, and the trace brings
    the simulated step nearer than the cluster file alone.
    """
    config = small_config(
        model={"num_layers": 4, "hidden_size": 64},
        parallel={"pipeline": pipeline, "data": data, "expert": data},
        schedule={"name": schedule, "num_microbatches": 6},
        data={"sequence_length": 64, "sequences_per_microbatch": 2},
    )
    ranks = run_ranks(2, traced_run, config, tmp_path)
    measured, step = min((max(both), step) for step, both in enumerate(zip(*ranks, strict=True), WARM_UP + 1))
    machine = Machine(load_cluster("laptop"))
    calibration = calibration_from_trace(config, machine, tmp_path / "trace" / f"step_{step}.json")
    calibrated = Machine(machine.cluster, calibration)
    program = case.make_program(config)
    predicted = Simulation(program, run_costs(config, calibrated)).makespan
    blind = Simulation(program, run_costs(config, machine)).makespan
    assert abs(log(predicted / measured)) < log(1.6), calibration.text()
    assert abs(log(predicted / measured)) < abs(log(blind / measured))
