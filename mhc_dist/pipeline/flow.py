"""The dataflow of one chunk, looked up both ways. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    ChunkShape,
    ExchangeShape,
    ItemShape,
)


class ChunkFlow:
    """Who writes a value, who reads it, and who sends a gradient back to it."""

    def __init__(self, shape: ChunkShape) -> None:
        self.shape = shape
        self.exchanges = shape.exchanges
        self.phases = shape.phases
        self.items: dict[str, ItemShape] = {item.name: item for item in shape.items}
        self.writer: dict[str, ItemShape] = {}
        self.gradient_readers: dict[str, list[ItemShape]] = {CHUNK_INPUT: [], CHUNK_TARGETS: []}
        for item in shape.items:
            for value in item.reads:
                if value not in self.gradient_readers:
                    raise ValueError(f"{item.name} reads {value!r}, which nothing before it writes.")
            for value in values_with_gradient(item):
                self.gradient_readers[value].append(item)
            for value in item.writes:
                if value in self.gradient_readers:
                    raise ValueError(f"{item.name} writes {value!r}, which was already written.")
                self.writer[value] = item
                self.gradient_readers[value] = []
        dropping = {phase.name for phase in self.phases if phase.drops}
        for phase in self.phases:
            for name in phase.recompute_after:
                if not phase.drops or name not in dropping:
                    raise ValueError(f"{phase.name} is to be recomputed after {name}, but one drops nothing.")
        if len(self.items) != len(shape.items):
            raise ValueError("two items of one chunk have the same name.")
        if CHUNK_OUTPUT not in self.writer:
            raise ValueError(f"no item of the chunk writes {CHUNK_OUTPUT!r}.")


def values_with_gradient(item: ItemShape) -> Iterable[str]:
    """What the backward of `item` sends a gradient to: all reads of a phase but the targets, the
    payload of an exchange.
    """
    if isinstance(item, ExchangeShape):
        return item.reads[:1] if item.differentiable else ()
    return dict.fromkeys(value for value in item.reads if value != CHUNK_TARGETS)
