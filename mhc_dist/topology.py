"""Where a process stands: rank <-> (pipeline, data, expert). Standard library only.

    rank = pipeline_rank * data + data_rank

Pipeline is the outermost dimension and data the fastest one. An expert group is `expert` consecutive data
ranks of one pipeline rank: neighbours in rank order sit on one node, and all-to-all is the traffic that
gains most from a node's fast links. Ranks that hold the same experts of the same stage (equal
`expert_rank`) form an expert-data group: expert gradients are summed over it.

Example, pipeline = 2, data = 4, expert = 2 (eight processes):

    pipeline 0:  ranks [0 1] [2 3]   expert groups in brackets; expert-data groups (0 2) and (1 3)
    pipeline 1:  ranks [4 5] [6 7]                              expert-data groups (4 6) and (5 7)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Topology:
    """One rank's place among pipeline x data processes. Call `check` on numbers a user wrote."""

    pipeline: int
    data: int
    expert: int
    rank: int = 0

    def check(self) -> None:
        """Raise ValueError, with the numbers and a remedy, when the sizes do not fit together."""
        for name, size in (("pipeline", self.pipeline), ("data", self.data), ("expert", self.expert)):
            if size < 1:
                raise ValueError(f"parallel.{name}={size} is less than 1. Set it to 1 or more.")
        if self.data % self.expert != 0:
            divisors = [size for size in range(1, self.data + 1) if self.data % size == 0]
            raise ValueError(
                f"parallel.expert={self.expert} does not divide parallel.data={self.data}: an expert group is"
                f" made of whole data ranks. Set parallel.expert to one of {divisors}."
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank {self.rank} is outside 0..{self.world_size - 1}, the ranks of parallel.pipeline="
                f"{self.pipeline} x parallel.data={self.data}. Start exactly {self.world_size} processes."
            )

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError when `world_size` processes were started for a different number of places."""
        if world_size != self.world_size:
            raise ValueError(
                f"{world_size} processes were started, but parallel.pipeline={self.pipeline} x parallel.data="
                f"{self.data} needs {self.world_size}. Start {self.world_size} processes or change the sizes."
            )

    def at(self, rank: int) -> Topology:
        """The same layout seen from another rank."""
        return replace(self, rank=rank)

    # Sizes and coordinates

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data

    @property
    def pipeline_rank(self) -> int:
        return self.rank // self.data

    @property
    def data_rank(self) -> int:
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.data_rank % self.expert

    @property
    def expert_data(self) -> int:
        """Number of ranks of a stage that hold the same experts."""
        return self.data // self.expert

    def rank_of(self, pipeline_rank: int, data_rank: int) -> int:
        assert 0 <= pipeline_rank < self.pipeline, f"pipeline rank {pipeline_rank} of {self.pipeline}"
        assert 0 <= data_rank < self.data, f"data rank {data_rank} of {self.data}"
        return pipeline_rank * self.data + data_rank

    # This rank's groups, as world ranks in increasing order

    @property
    def data_group_ranks(self) -> tuple[int, ...]:
        """Ranks of this stage: dense gradients are summed over them."""
        first = self.pipeline_rank * self.data
        return tuple(range(first, first + self.data))

    @property
    def expert_group_ranks(self) -> tuple[int, ...]:
        """Ranks that together hold all experts of this stage and exchange tokens."""
        first = self.rank - self.expert_rank
        return tuple(range(first, first + self.expert))

    @property
    def expert_data_group_ranks(self) -> tuple[int, ...]:
        """Ranks of this stage with the same experts: expert gradients are summed over them."""
        return self.data_group_ranks[self.expert_rank :: self.expert]

    @property
    def pipeline_group_ranks(self) -> tuple[int, ...]:
        """Ranks that one data rank's microbatches travel through, in pipeline order."""
        return tuple(range(self.data_rank, self.world_size, self.data))

    @property
    def neighbour_ranks(self) -> tuple[int, ...]:
        """Ranks one pipeline step away: the peers of this rank's sends and receives."""
        stages = (self.pipeline_rank - 1, self.pipeline_rank + 1)
        return tuple(self.rank_of(stage, self.data_rank) for stage in stages if 0 <= stage < self.pipeline)

    # All groups of the world, the same list on every rank: process groups are created in this order

    def all_data_groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self._member(stage, 0).data_group_ranks for stage in range(self.pipeline))

    def all_expert_groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            self._member(stage, first).expert_group_ranks
            for stage in range(self.pipeline)
            for first in range(0, self.data, self.expert)
        )

    def all_expert_data_groups(self) -> tuple[tuple[int, ...], ...]:
        return tuple(
            self._member(stage, share).expert_data_group_ranks
            for stage in range(self.pipeline)
            for share in range(self.expert)
        )

    def all_channels(self, links: Iterable[tuple[int, int]] | None = None) -> tuple[tuple[int, int], ...]:
        """Ordered pairs (source, destination) of ranks for `links` between pipeline ranks, in every column.

        By default the links of a line: each pipeline rank with the next, both ways.
        """
        if links is None:
            links = [(a, b) for a in range(self.pipeline) for b in (a - 1, a + 1) if 0 <= b < self.pipeline]
        return tuple(
            (self.rank_of(a, column), self.rank_of(b, column))
            for column in range(self.data)
            for a, b in links
        )

    def _member(self, pipeline_rank: int, data_rank: int) -> Topology:
        """The layout as one member of a group sees it: asking every rank would take the ranks' square."""
        return self.at(self.rank_of(pipeline_rank, data_rank))
