"""An action in the words of a dump: what a rank does, what it waits for, and from which ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.topology import Topology


class Doing(NamedTuple):
    """Made for every action, hundreds a step; the words are found only when somebody asks for them."""

    action: Action
    topology: Topology

    def __str__(self) -> str:
        waits_for = self._waits_for()
        return f"{self.action}" if waits_for is None else f"{self.action}, waiting for {waits_for}"

    def _waits_for(self) -> str | None:
        action, topology = self.action, self.topology
        match action.kind:
            case ActionKind.ARRIVE:
                assert action.peer is not None
                what = "streams" if action.direction is Pass.FORWARD else "gradients"
                return f"{what} from rank {topology.rank_of(action.peer, topology.data_rank)}"
            case ActionKind.WAIT:
                return f"tokens of {_ranks(set(topology.expert_group_ranks) - {topology.rank})}"
            case ActionKind.STEP:
                others = set(range(topology.world_size)) - {topology.rank}
                return f"gradients of {_ranks(others)}"
        return None


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    if not numbers:
        return "no other rank"
    if len(numbers) > 8:
        return f"ranks {numbers[0]}..{numbers[-1]}"
    return f"rank{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"
