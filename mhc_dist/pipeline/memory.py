"""Bytes that each rank holds, action by action. Needs no clock: a rank runs its actions in order.

Standard library only.
"""

from __future__ import annotations

from mhc_dist.pipeline.action import Action, ActionKind, Program
from mhc_dist.pipeline.cost import CostTable, bytes_at_end, bytes_at_start
from mhc_dist.pipeline.errors import InvalidProgram


class SendBuffers:
    """Buffers of messages on their way out: each channel keeps its latest until the next one leaves."""

    def __init__(self, costs: CostTable) -> None:
        self._payload_bytes = costs.message.payload_bytes
        self._peers: set[int | None] = set()

    def grow(self, action: Action) -> int:
        """Bytes by which the buffers grow when `action` starts: those of a channel's first message."""
        if action.kind is not ActionKind.SEND or action.peer in self._peers:
            return 0
        self._peers.add(action.peer)
        return self._payload_bytes

    @property
    def held(self) -> int:
        """Bytes that are given back when the program is over."""
        return len(self._peers) * self._payload_bytes


def held_bytes(program: Program, costs: CostTable, rank: int) -> list[tuple[Action, int]]:
    """Every action of `rank` with the bytes held while it runs."""
    held = costs.static_bytes[rank] if costs.static_bytes else 0
    result: list[tuple[Action, int]] = []
    sending = SendBuffers(costs)
    for action in program.actions[rank]:
        held += bytes_at_start(action, costs) + sending.grow(action)
        result.append((action, held))
        held -= bytes_at_end(action, costs, training=program.training)
    return result


def settled_bytes(program: Program, costs: CostTable, rank: int) -> list[tuple[Action, int]]:
    """Every action of `rank` with the bytes that are held once it is done."""
    return [
        (action, held - bytes_at_end(action, costs, training=program.training))
        for action, held in held_bytes(program, costs, rank)
    ]


def check_memory(program: Program, costs: CostTable, budget: int) -> None:
    """Raise InvalidProgram at the first action that needs more than `budget` bytes on its rank."""
    for rank in range(program.num_ranks):
        for action, held in held_bytes(program, costs, rank):
            if held > budget:
                reason = f"needs {held / 1e9:.3f} GB of {budget / 1e9:.3f} GB, {held - budget} bytes too much"
                raise InvalidProgram(rank, action, reason)
