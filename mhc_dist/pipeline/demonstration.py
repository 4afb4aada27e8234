"""A placed program in round numbers, to look at a schedule without a model. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mhc_dist.pipeline.action import ChunkShape, ExchangeShape, PhaseShape, Program
from mhc_dist.pipeline.cost import CostTable, ExchangeCost, MessageCost, PhaseCost
from mhc_dist.pipeline.place import place_and_simulate
from mhc_dist.pipeline.recompute_blocks import with_recompute
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.simulate import Simulation

SHARES = {"attention": 0.4, "shared": 0.1, "experts": 0.4, "finish": 0.1}
"""How one forward divides over the phases of a layer with experts."""

MESSAGE = 0.02
"""A transfer to the next rank, in forwards of a rank's whole share."""


@dataclass(frozen=True)
class Shown:
    """What pictures are made of: a program and its simulated run. `unit` names a unit of its time."""

    program: Program
    simulation: Simulation
    unit: str


def demonstrate(schedule: CoarseSchedule, *, wire: float, recompute: float = 0.0) -> Shown:
    """One layer with experts per chunk; forward, input gradient and weight gradient cost 1 per rank and
    microbatch, an all-to-all costs `wire`, recomputation before a backward `recompute`.
    """
    shape = ChunkShape(
        (
            PhaseShape("attention", ("input",), ("streams", "hidden", "rows")),
            ExchangeShape("dispatch", ("rows",), ("arrived",)),
            PhaseShape("shared", ("hidden",), ("shared_out",)),
            PhaseShape("experts", ("arrived",), ("answers",)),
            ExchangeShape("combine", ("answers",), ("returned",)),
            PhaseShape("finish", ("streams", "shared_out", "returned"), ("output",), has_weights=False),
        )
    )
    if recompute:
        shape = with_recompute(shape, [["attention"]])
    share = schedule.num_ranks * schedule.num_copies / len(schedule.chunk_rank)
    # The phase without weights still has a weight half to account for; attention carries it.
    weights = {"attention": SHARES["attention"] + SHARES["finish"], "finish": 0.0}
    phases = {
        (chunk, name): PhaseCost(
            forward=seconds * share,
            input_gradient=seconds * share,
            weight_gradient=weights.get(name, seconds) * share,
            recompute=recompute * share if name == "attention" else 0.0,
            saved_bytes=1,
        )
        for chunk in range(len(schedule.chunk_rank))
        for name, seconds in SHARES.items()
    }
    exchanges = {
        (chunk, exchange.name): ExchangeCost(wire * share, wire * share, "all-to-all")
        for chunk in range(len(schedule.chunk_rank))
        for exchange in shape.exchanges
    }
    costs = CostTable(
        phases, exchanges, MessageCost(MESSAGE * share, 0, "p2p"), static_bytes=(0,) * schedule.num_ranks
    )
    return Shown(*place_and_simulate(schedule, (shape,) * len(schedule.chunk_rank), costs), "forward")
