"""Cost tables in round numbers for tests of placement and simulation."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mhc_dist.pipeline.action import ChunkShape
from mhc_dist.pipeline.cost import CostTable, ExchangeCost, Jitter, MessageCost, PhaseCost
from mhc_dist.pipeline.schedules.coarse import CoarseSchedule
from mhc_dist.pipeline.tempo import Tempo

SECONDS = {"attention": 1.0, "shared": 0.25, "experts": 1.0, "merge": 0.125, "body": 1.0}


def costs_for(
    schedule: CoarseSchedule,
    shape: ChunkShape,
    *,
    wire: float = 0.0,
    counts: float = 0.0,
    recompute: float = 0.0,
    message: float = 0.0,
) -> CostTable:
    """Every chunk alike; input and weight gradient each cost one forward. Bytes: 100 saved a phase, of which
    40 are inputs of weight gradients; 20 dropped; 30 of gradients; 1000 static; 10 a message.
    """
    phases: dict[tuple[int, str], PhaseCost] = {}
    exchanges: dict[tuple[int, str], ExchangeCost] = {}
    for chunk in range(len(schedule.chunk_rank)):
        for phase in shape.phases:
            seconds = SECONDS[phase.name.rstrip("0123456789")]
            phases[chunk, phase.name] = PhaseCost(
                forward=seconds,
                input_gradient=seconds,
                weight_gradient=seconds if phase.has_weights else 0.0,
                recompute=recompute if phase.drops else 0.0,
                saved_bytes=100,
                dropped_bytes=20 if phase.drops else 0,
                weight_input_bytes=40,
                output_gradient_bytes=30,
            )
        for exchange in shape.exchanges:
            seconds = wire if exchange.differentiable else counts
            exchanges[chunk, exchange.name] = ExchangeCost(
                seconds, seconds if exchange.differentiable else 0.0
            )
    return CostTable(
        phases,
        exchanges,
        MessageCost(message, 10),
        static_bytes=(1000,) * schedule.num_ranks,
    )


def apart(factors: Sequence[float], num_ranks: int, num_members: int) -> Jitter:
    """Every quarter of a second's work takes one of `factors` times as long, drawn member by member."""
    random = Random(0)

    def tempo() -> Tempo:
        return Tempo(tuple((0.25, random.choice(factors)) for _ in range(400)))

    return Jitter(tuple(tuple(tempo() for _ in range(num_members)) for _ in range(num_ranks)))
