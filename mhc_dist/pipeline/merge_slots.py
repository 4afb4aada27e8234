"""Which neighbouring slots of a rank may run side by side, although the schedule does not pair them.

While a pipeline fills and drains, passes run alone and their exchanges are exposed. Two of them can share
their windows if the second one's input is already there when the first one starts. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhc_dist.pipeline.action import Program
from mhc_dist.pipeline.run_times import RunTimes
from mhc_dist.pipeline.schedules.coarse import Op, OpKind
from mhc_dist.pipeline.simulate import Simulation

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Group:
    """Passes of one rank that run side by side.

    ordered: a later one only fills gaps of an earlier one. after[i]: how many of the first ones have to be
    over before pass i starts; empty where nothing has to.
    """

    ops: tuple[Op, ...]
    ordered: bool = False
    after: tuple[int, ...] = ()

    @property
    def first(self) -> Op:
        return self.ops[0]

    @property
    def is_weights(self) -> bool:
        return self.first.kind is OpKind.W


def merge_slots(
    groups: Sequence[Sequence[Group]], program: Program, simulation: Simulation, *, ordered: bool
) -> list[list[Group]]:
    """`groups` with neighbours joined where the run of `program` shows that nobody has to wait for it: in
    pairs, or in ordered chains of forwards and of input gradients.

    Safe: in that run every input of a joined pass was sent before the pass in front of it started. So the
    times of that run order the joined groups without a circle. In a chain a pass may start while others than
    the one in front of it are under way: it comes after the last one that it may not be joined with.
    """
    times = RunTimes(program, simulation)
    merge_rank = _chain_rank if ordered else _pair_rank
    return [merge_rank(own, times) for own in groups]


def _pair_rank(groups: Sequence[Group], times: RunTimes) -> list[Group]:
    result: list[Group] = []
    position = 0
    while position < len(groups):
        group = groups[position]
        partner = _partner(groups, position)
        if partner is None or not _may_join(group.first, groups[partner].first, times):
            result.append(group)
            position += 1
            continue
        result.append(Group((group.first, groups[partner].first)))
        result += groups[position + 1 : partner]
        position = partner + 1
    return result


def _chain_rank(groups: Sequence[Group], times: RunTimes) -> list[Group]:
    """Weight halves in between move behind the chain, whose gaps they may fill."""
    result: list[Group] = []
    position = 0
    while position < len(groups):
        group = groups[position]
        chain, after = [group.first], [0]
        weights: list[Group] = []
        partner = _partner(groups, position) if group.first.kind in _CHAINED else None
        while (
            partner is not None
            and groups[partner].first.kind in _CHAINED
            and _may_join(chain[-1], groups[partner].first, times)
        ):
            weights += groups[position + 1 : partner]
            following = groups[partner].first
            apart = [place for place, op in enumerate(chain, 1) if not _may_join(op, following, times)]
            after.append(max(apart, default=0))
            chain.append(following)
            position = partner
            partner = _partner(groups, position)
        result.append(Group(tuple(chain), ordered=True, after=tuple(after)) if len(chain) > 1 else group)
        result += weights
        position += 1
    return result


_CHAINED = (OpKind.F, OpKind.I)
"""Passes that leave no weight gradients to be run before their group ends."""


def _partner(groups: Sequence[Group], position: int) -> int | None:
    """The next single pass after a single pass; weight halves in between may wait for it."""
    if len(groups[position].ops) != 1 or groups[position].is_weights:
        return None
    for other in range(position + 1, len(groups)):
        if len(groups[other].ops) != 1:
            return None
        if not groups[other].is_weights:
            return other
    return None


def _may_join(first: Op, second: Op, times: RunTimes) -> bool:
    """Different chunks or different directions, so that sums over microbatches keep their order."""
    if first.microbatch == second.microbatch and abs(first.chunk - second.chunk) <= 1:
        return False
    both_backward = OpKind.F not in (first.kind, second.kind)
    if both_backward and first.chunk == second.chunk:
        return False
    return times.ready(second) <= times.start(first) + TOLERANCE
