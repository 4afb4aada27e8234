"""Do all ranks run the same thing? Asked once, before step 1: afterwards a difference is a hang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch.distributed as dist


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compare named facts (versions, hashes) over all ranks; collective over the world.

    Called before any other process group is made: which ones there are may follow from what is compared.

    Raises:
        ValueError: on every rank alike, naming the fact, the ranks that differ from most, and both values.
    """
    gathered: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(facts))
    for name in gathered[0]:
        values = [facts_of_rank.get(name, "unknown") for facts_of_rank in gathered]
        ((common, _),) = Counter(values).most_common(1)
        others = {rank: value for rank, value in enumerate(values) if value != common}
        if others:
            ranks = ", ".join(f"rank {rank} has {value}" for rank, value in others.items())
            raise ValueError(
                f"ranks disagree on {name}: most have {common}, but {ranks}. Start all of them with the same"
                " configuration, code and library versions."
            )
