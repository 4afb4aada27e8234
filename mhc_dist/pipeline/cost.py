"""What actions cost: seconds, lanes and bytes, as plain data. Standard library only.

`mhc_dist.plan` fills these tables from a model and a cluster, `calibrate` from the trace of a real run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mhc_dist.pipeline.action import Action, ActionKind, Pass
from mhc_dist.pipeline.tempo import Tempo


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Seconds of one phase for one microbatch, and the bytes it leaves behind.

    saved_bytes: kept from its forward to its backward. dropped_bytes: dropped after the forward, brought back
    by RECOMPUTE for the backward. A deferred weight gradient still needs weight_input_bytes of those, and
    output_gradient_bytes that its input-gradient half made.

    Between phases, values and gradients wait for who reads them: the forward takes taken_bytes and leaves
    left_bytes, the backward gradient_taken_bytes and gradient_left_bytes. What a chunk receives and hands on
    counts among them.
    """

    forward: float
    input_gradient: float
    weight_gradient: float = 0.0
    recompute: float = 0.0
    saved_bytes: int = 0
    dropped_bytes: int = 0
    weight_input_bytes: int = 0
    output_gradient_bytes: int = 0
    taken_bytes: int = 0
    left_bytes: int = 0
    gradient_taken_bytes: int = 0
    gradient_left_bytes: int = 0

    @property
    def deferred_bytes(self) -> int:
        return self.weight_input_bytes + self.output_gradient_bytes


@dataclass(frozen=True, slots=True)
class ExchangeCost:
    """Seconds on the wire, each way, and the lane that carries it: one lane carries one thing at a time.

    buffer_bytes: while rows fly they are held twice, as they left and as they arrive.
    """

    forward: float
    backward: float
    lane: str = "link"
    buffer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MessageCost:
    """One transfer of streams (or their gradient) between pipeline ranks."""

    seconds: float = 0.0
    payload_bytes: int = 0
    lane: str = "network"


@dataclass(frozen=True, slots=True)
class Jitter:
    """Phases of real ranks do not all last their cost, nor as long on one rank as on another.

    tempos[p][m]: what phases lasted on member m of an expert group of pipeline rank p; as many members for
    every p, all watched at the same time.
    """

    tempos: tuple[tuple[Tempo, ...], ...]

    @property
    def num_members(self) -> int:
        """So many ranks of an expert group wait for each other at exchanges."""
        return len(self.tempos[0])


@dataclass(frozen=True)
class CostTable:
    """Costs of every action of a program. Keys of phases and exchanges are (chunk, item name).

    static_bytes[r]: parameters, gradients and optimizer state of rank r. reduce_seconds and step_seconds are
    what is left exposed at the end of a step. overheads: what actions other than phases cost the rank's
    thread by themselves, such as starting an exchange; nothing unless a run was measured. jitter: how much
    phases differ from their cost; None where they last exactly that, as far as is known.
    """

    phases: Mapping[tuple[int, str], PhaseCost]
    exchanges: Mapping[tuple[int, str], ExchangeCost]
    message: MessageCost = MessageCost()
    reduce_seconds: float = 0.0
    step_seconds: float = 0.0
    static_bytes: tuple[int, ...] = ()
    overheads: Mapping[ActionKind, float] = field(default_factory=dict)
    jitter: Jitter | None = None

    def seconds(self, action: Action) -> float:
        """How long `action` keeps its rank's compute busy; communication and bookkeeping take none."""
        match action.kind:
            case ActionKind.COMPUTE:
                return self.phase(action).forward
            case ActionKind.GRADIENT:
                phase = self.phase(action)
                return phase.input_gradient + (0.0 if action.defer_weights else phase.weight_gradient)
            case ActionKind.WEIGHT:
                return self.phase(action).weight_gradient
            case ActionKind.RECOMPUTE:
                return self.phase(action).recompute
            case ActionKind.REDUCE:
                return self.reduce_seconds
            case ActionKind.STEP:
                return self.step_seconds
            case _:
                return 0.0

    def phase(self, action: Action) -> PhaseCost:
        return self.phases[action.chunk, action.item]

    def wire_seconds(self, action: Action) -> float:
        """How long the exchange that `action` issues occupies its lane."""
        exchange = self.exchanges[action.chunk, action.item]
        return exchange.forward if action.direction is Pass.FORWARD else exchange.backward

    def lane(self, action: Action) -> str:
        return self.exchanges[action.chunk, action.item].lane


def with_slower_wires(costs: CostTable, factor: float) -> CostTable:
    """`costs` with exchanges that take `factor` times as long."""
    exchanges = {
        key: replace(cost, forward=factor * cost.forward, backward=factor * cost.backward)
        for key, cost in costs.exchanges.items()
    }
    return replace(costs, exchanges=exchanges)


def bytes_at_start(action: Action, costs: CostTable) -> int:
    """Bytes that `action` needs beyond what is live, from the moment it starts."""
    match action.kind:
        case ActionKind.COMPUTE:
            phase = costs.phase(action)
            return phase.saved_bytes + phase.dropped_bytes + phase.left_bytes
        case ActionKind.RECOMPUTE:
            return costs.phase(action).dropped_bytes
        case ActionKind.GRADIENT:
            phase = costs.phase(action)
            deferred = phase.output_gradient_bytes if action.defer_weights else 0
            return deferred + phase.gradient_left_bytes
        case ActionKind.ISSUE:
            return costs.exchanges[action.chunk, action.item].buffer_bytes
        case ActionKind.RECV:
            return costs.message.payload_bytes
        case _:
            return 0


def bytes_at_end(action: Action, costs: CostTable, *, training: bool = True) -> int:
    """Bytes that become free when `action` ends."""
    match action.kind:
        case ActionKind.COMPUTE:
            phase = costs.phase(action)
            saved = 0 if training else phase.saved_bytes
            return phase.dropped_bytes + phase.taken_bytes + saved
        case ActionKind.GRADIENT:
            phase = costs.phase(action)
            kept = phase.weight_input_bytes if action.defer_weights else 0
            return phase.saved_bytes + phase.dropped_bytes + phase.gradient_taken_bytes - kept
        case ActionKind.WEIGHT:
            return costs.phase(action).deferred_bytes
        case ActionKind.WAIT:
            return costs.exchanges[action.chunk, action.item].buffer_bytes
        case ActionKind.SEND:
            return costs.message.payload_bytes
        case _:
            return 0
