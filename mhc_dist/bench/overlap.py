"""`mhc-dist bench overlap`: what placement hides, on an emulated link, against the same steps without it.

Four variants take turns within one run, on the same batches and to the same bits:

    no overlap          phases one after the other, every exchange awaited where its result is needed
    overlap             phases placed; nothing recomputed
    overlap, late       phases placed; streams recomputed right before their use
    overlap, placed     phases placed, recomputation too
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from mhc_kernels.seam import make_backend
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from mhc_dist.bench.alone import Nobody, random_microbatches
from mhc_dist.bench.hidden import HiddenReport, hidden_report
from mhc_dist.bench.result import shown_command, write_result
from mhc_dist.config import RunConfig, load_config
from mhc_dist.config_sections import RecomputeConfig
from mhc_dist.parallel.emulated_link import EmulatedLink
from mhc_dist.parallel.expert_exchange import ExpertExchange
from mhc_dist.parallel.process_groups import ProcessGroups
from mhc_dist.parallel.stage import Stage
from mhc_dist.pipeline.action import ActionKind, Pass, Program
from mhc_dist.pipeline.calibrate import calibrate
from mhc_dist.pipeline.cost import CostTable
from mhc_dist.pipeline.executor import Executor, Microbatch
from mhc_dist.pipeline.lower import lower
from mhc_dist.pipeline.perfetto import TraceEvent
from mhc_dist.pipeline.place import Placement
from mhc_dist.pipeline.trace import Trace
from mhc_dist.pipeline.validate import validate
from mhc_dist.plan.cluster import load_cluster
from mhc_dist.plan.layout import own_shapes, schedule_of
from mhc_dist.plan.machine import Machine
from mhc_dist.plan.run_costs import placed_program, run_costs
from mhc_dist.topology import Topology

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench.yaml"
LATENCY_SECONDS = 1e-4
NO_OVERLAP, OVERLAP, LATE, PLACED = "no_overlap", "overlap", "overlap_late_recompute", "overlap_placed"
RECOMPUTES = {NO_OVERLAP: "none", OVERLAP: "none", LATE: "mhc", PLACED: "mhc"}


@dataclass
class _Variant:
    """One way to run the step, and what it measured."""

    stage: Stage
    program: Program
    seconds: list[float]
    reports: list[HiddenReport]

    def run(self, microbatches: Sequence[Microbatch]) -> tuple[float, Trace]:
        """One step; gradients are left in the parameters."""
        for parameter in self.stage.parameters():
            parameter.grad = None
        nobody = Nobody()
        dist.barrier()
        start = perf_counter()
        output = Executor(0, self.stage.by_index, nobody).run(self.program, microbatches, nobody)
        return perf_counter() - start, output.trace

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.stage.logical_parameters() if p.grad is not None}


def measure(rank: int, store: str, config: RunConfig, ratio: float, rounds: int, result: Path) -> None:
    """One rank of the bench. Rank 0 writes its figures to `result`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=config.num_processes)
    topology = Topology(1, config.parallel.data, config.parallel.expert, rank)
    groups = ProcessGroups.build(topology)
    exchange = ExpertExchange(
        config.model.num_experts, topology.expert, groups.expert_forward, groups.expert_backward
    )
    shapes = {mode: own_shapes(_with(config, mode)) for mode in ("none", "mhc")}
    stages = {
        mode: Stage(
            _with(config, mode),
            shapes[mode].places,
            make_backend(config.kernels.backend),
            exchange,
            topology.expert_rank,
            torch.device("cpu"),
        )
        for mode in shapes
    }
    # Work makes figures, not text: random tokens spread over the experts as an untrained router sends them.
    microbatches = random_microbatches(config, seed=rank)

    schedule = schedule_of(config)
    plain = {mode: lower(schedule, shapes[mode].chunks) for mode in shapes}
    warm = {mode: _Variant(stages[mode], plain[mode], [], []) for mode in shapes}
    traces = {mode: [variant.run(microbatches)[1] for _ in range(3)][1:] for mode, variant in warm.items()}
    link = _link_for(traces["none"], ratio)
    exchange.use_link(link)

    costs = {mode: _costs(_with(config, mode), trace, link) for mode, trace in traces.items()}
    machine = Machine(load_cluster(config.schedule.cluster or "laptop"))
    placements = {OVERLAP: Placement(), LATE: Placement(prefetch_recompute=False), PLACED: Placement()}
    programs = {NO_OVERLAP: plain["none"]}
    for name, placement in placements.items():
        mode = RECOMPUTES[name]
        programs[name] = placed_program(_with(config, mode), machine, placement, costs[mode])
    for program in programs.values():
        validate(program)
    variants = {name: _Variant(stages[RECOMPUTES[name]], p, [], []) for name, p in programs.items()}

    want: dict[str, Tensor] | None = None
    for turn in range(rounds + 1):
        for variant in variants.values():
            seconds, trace = variant.run(microbatches)
            if turn == 0:  # warms up, and proves that all variants compute the same
                want = want or {name: g.clone() for name, g in variant.gradients().items()}
                got = variant.gradients()
                if got.keys() != want.keys() or any(not torch.equal(got[n], want[n]) for n in want):
                    raise RuntimeError("variants do not compute the same gradients, so times say nothing")
                continue
            variant.seconds.append(seconds)
            variant.reports.append(hidden_report(trace.events, link.seconds))
    if rank == 0:
        result.write_text(json.dumps(_figures(variants, link, ratio)))
    dist.destroy_process_group()


def _with(config: RunConfig, mode: str) -> RunConfig:
    block = config.recompute.block
    return config.model_copy(update={"recompute": RecomputeConfig(mode=mode, block=block)})  # type: ignore[arg-type]


def _link_for(traces: Sequence[Trace], ratio: float) -> EmulatedLink:
    """A link on which a step's exchanges take `ratio` of its compute time; the same on all ranks."""
    compute_kinds = (ActionKind.COMPUTE, ActionKind.GRADIENT, ActionKind.WEIGHT)
    compute = statistics.median(
        sum(e.end - e.start for e in trace.events if e.action.kind in compute_kinds) for trace in traces
    )
    issues = [e.payload_bytes for e in traces[0].events if e.action.kind is ActionKind.ISSUE]
    facts = torch.tensor([compute, float(sum(issues))], dtype=torch.float64)
    dist.all_reduce(facts)
    compute, payload = (facts / dist.get_world_size()).tolist()
    return EmulatedLink(LATENCY_SECONDS, payload / (ratio * compute - len(issues) * LATENCY_SECONDS))


def _costs(config: RunConfig, traces: Sequence[Trace], link: EmulatedLink) -> CostTable:
    """Compute from the traces, exchanges from the link; rank 0's, so that all ranks place alike."""
    predicted = run_costs(config, Machine(load_cluster(config.schedule.cluster or "laptop")))
    events = [
        TraceEvent(0, e.action, e.start, e.end, e.payload_bytes)
        for trace in traces
        for e in trace.events
        if e.action.kind not in (ActionKind.ISSUE, ActionKind.WAIT)
    ]
    measured = calibrate(predicted, events)
    payloads: dict[tuple[int, str], list[int]] = {}
    for trace in traces:
        for e in trace.events:
            if e.action.kind is ActionKind.ISSUE:
                payloads.setdefault((e.action.chunk, e.action.item), []).append(e.payload_bytes)
    exchanges = {}
    for key, cost in measured.exchanges.items():
        seconds = link.seconds(round(statistics.mean(payloads[key])))
        exchanges[key] = replace(cost, forward=seconds, backward=seconds)
    box = [replace(measured, exchanges=exchanges)]
    dist.broadcast_object_list(box)
    return box[0]


def _figures(variants: dict[str, _Variant], link: EmulatedLink, ratio: float) -> dict[str, Any]:
    def median_of(name: str, figure: Any) -> float | None:
        values = [figure(report) for report in variants[name].reports]
        return None if None in values else statistics.median(values)

    forward, backward = Pass.FORWARD, Pass.BACKWARD
    steps = {name: statistics.median(variant.seconds) for name, variant in variants.items()}
    speedups = {
        name: statistics.median(
            a / b for a, b in zip(variants[NO_OVERLAP].seconds, variant.seconds, strict=True)
        )
        for name, variant in variants.items()
    }
    return {
        "all_to_all_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio()),
        "forward_combine_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio(("combine", forward))),
        "backward_combine_hidden_ratio": median_of(PLACED, lambda r: r.hidden_ratio(("combine", backward))),
        "recompute_hidden_ratio": median_of(PLACED, lambda r: r.recompute_hidden_ratio),
        "all_to_all_to_compute_ratio": ratio,
        "link_bytes_per_second": link.bytes_per_second,
        "link_latency_seconds": link.latency_seconds,
        "rounds": len(variants[PLACED].seconds),
        "gradients_bit_equal": True,
        "step_seconds": steps,
        "speedup_over_no_overlap": speedups,
        "all_to_all_hidden": {name: median_of(name, lambda r: r.hidden_ratio()) for name in variants},
        "recompute_hidden": {name: median_of(name, lambda r: r.recompute_hidden_ratio) for name in variants},
    }


def run(config: RunConfig, ratio: float, rounds: int) -> dict[str, Any]:
    """Start the ranks and return rank 0's figures."""
    if config.parallel.pipeline != 1 or config.parallel.data != 2 or config.parallel.expert != 2:
        raise ValueError(
            f"the overlap bench runs 1 pipeline rank with experts over 2, not {config.parallel.pipeline} with"
            f" {config.parallel.expert} of {config.parallel.data}. Set parallel.pipeline=1, parallel.data=2"
            " and parallel.expert=2."
        )
    if not ratio > 0 or rounds < 1:
        raise ValueError(f"ratio={ratio} must be above 0 and rounds={rounds} at least 1.")
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        result = Path(folder) / "figures.json"
        spawn(
            measure,
            (f"{folder}/store", config, ratio, rounds, result),
            nprocs=config.num_processes,
        )
        figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mhc-dist bench overlap", description=__doc__)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ratio", type=float, default=0.6, help="all-to-all time over compute time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        figures = run(load_config(options.config, options.set), options.ratio, options.rounds)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        sys.exit(2)
    command = shown_command("overlap", arguments)
    name = f"overlap_{options.ratio:g}"
    label = "emulated link; compute measured, two ranks on two cores"
    path = write_result(name, options.results, command, label, figures)
    print(f"{label}; written to {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
