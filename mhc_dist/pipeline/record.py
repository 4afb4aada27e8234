"""What the validator knows of one (chunk, microbatch) while it interprets a program."""

from __future__ import annotations

from mhc_dist.pipeline.action import (
    CHUNK_INPUT,
    CHUNK_OUTPUT,
    CHUNK_TARGETS,
    Action,
    ActionKind,
    ExchangeShape,
    Pass,
    PhaseShape,
)
from mhc_dist.pipeline.flow import ChunkFlow


class Broken(Exception):  # noqa: N818 - internal signal, turned into InvalidProgram with rank and action
    """A rule of the dataflow is broken; the message says which."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Broken(reason)


class Record:
    """Abstract state of one microbatch in one chunk: which values and gradients exist, what is in flight.

    is_first, is_last: whether the chunk starts or ends the model, where nothing is received or sent.
    """

    def __init__(self, flow: ChunkFlow, *, is_first: bool, is_last: bool, training: bool) -> None:
        self._flow = flow
        self._is_first = is_first
        self._is_last = is_last
        self._training = training
        self.values: set[str] = {CHUNK_TARGETS} | ({CHUNK_INPUT} if is_first else set())
        self.computed: set[str] = set()
        self.gradients: set[str] = set()
        self.deferred: set[str] = set()
        self.recomputed: set[str] = set()
        self.exchanged: dict[tuple[str, Pass], bool] = {}
        self.sent: set[Pass] = set()
        self.output_gradient = is_last

    def apply(self, action: Action) -> None:
        """Advance by one action that concerns only this record; raises Broken."""
        match action.kind:
            case ActionKind.COMPUTE:
                self._compute(self._phase(action))
            case ActionKind.GRADIENT:
                self._gradient(self._phase(action), action)
            case ActionKind.WEIGHT:
                phase = self._phase(action)
                require(phase.name in self.deferred, "no weight gradients were put off, or they have run")
                self.deferred.remove(phase.name)
            case ActionKind.RECOMPUTE:
                self._recompute(self._phase(action))
            case ActionKind.ISSUE:
                self._issue(self._exchange(action), action)
            case ActionKind.WAIT:
                self._wait(self._exchange(action), action)
            case ActionKind.FREE:
                self._free()
            case _:
                raise Broken("this kind of action does not belong to a chunk's dataflow")

    def leave(self, direction: Pass) -> None:
        """The output (F) or the gradient of the input (B) is handed on."""
        require(direction not in self.sent, "already handed on")
        if direction is Pass.FORWARD:
            require(not self._is_last, "the last chunk has nobody to send to")
            require(CHUNK_OUTPUT in self.values, "the chunk's output does not exist yet")
        else:
            require(not self._is_first, "the first chunk has nobody to send to")
            require(self._gradient_complete(CHUNK_INPUT), "the gradient of the chunk's input is not complete")
        self.sent.add(direction)

    def enter(self, direction: Pass) -> None:
        """The input (F) or the gradient of the output (B) has come."""
        if direction is Pass.FORWARD:
            require(CHUNK_INPUT not in self.values, "the chunk's input is already there")
            self.values.add(CHUNK_INPUT)
        else:
            require(not self.output_gradient, "the gradient of the chunk's output is already there")
            self.output_gradient = True

    def _item(self, action: Action) -> PhaseShape | ExchangeShape:
        item = self._flow.items.get(action.item)
        require(item is not None, f"the chunk has no item {action.item!r}")
        assert item is not None
        return item

    def _phase(self, action: Action) -> PhaseShape:
        item = self._item(action)
        if not isinstance(item, PhaseShape):
            raise Broken(f"{item.name} is an exchange: it is issued and awaited, not computed")
        return item

    def _exchange(self, action: Action) -> ExchangeShape:
        item = self._item(action)
        if not isinstance(item, ExchangeShape):
            raise Broken(f"{item.name} is a phase: it is computed, not issued or awaited")
        require(action.direction is not None, "an exchange needs a direction")
        return item

    def _require_values(self, values: tuple[str, ...]) -> None:
        missing = [value for value in values if value not in self.values]
        require(not missing, f"{', '.join(missing)} not available yet")

    def _require_gradients(self, values: tuple[str, ...]) -> None:
        missing = [value for value in values if not self._gradient_complete(value)]
        require(not missing, f"gradient of {', '.join(missing)} not complete yet")

    def _gradient_complete(self, value: str) -> bool:
        """Every reader has contributed; an exchange contributes when its backward has been awaited."""
        for reader in self._flow.gradient_readers[value]:
            if isinstance(reader, PhaseShape):
                if reader.name not in self.gradients:
                    return False
            elif not self.exchanged.get((reader.name, Pass.BACKWARD), False):
                return False
        return value != CHUNK_OUTPUT or self.output_gradient

    def _compute(self, phase: PhaseShape) -> None:
        require(phase.name not in self.computed, "already computed")
        self._require_values(phase.reads)
        self.computed.add(phase.name)
        self.values.update(phase.writes)

    def _gradient(self, phase: PhaseShape, action: Action) -> None:
        require(self._training, "no backward outside training")
        require(phase.name in self.computed, "its forward has not run")
        require(phase.name not in self.gradients, "its backward has already run")
        require(not phase.drops or phase.name in self.recomputed, "what it dropped was not recomputed")
        self._require_gradients(phase.writes)
        self.gradients.add(phase.name)
        if action.defer_weights:
            require(phase.has_weights, "the phase has no weight gradients to put off")
            self.deferred.add(phase.name)

    def _recompute(self, phase: PhaseShape) -> None:
        require(phase.drops, "the phase drops nothing")
        require(phase.name in self.computed, "its forward has not run")
        require(phase.name not in self.recomputed, "already recomputed")
        missing = [name for name in phase.recompute_after if name not in self.recomputed]
        require(not missing, f"{', '.join(missing)} must be recomputed first")
        self.recomputed.add(phase.name)

    def _issue(self, exchange: ExchangeShape, action: Action) -> None:
        assert action.direction is not None
        key = (exchange.name, action.direction)
        require(key not in self.exchanged, "already issued")
        if action.direction is Pass.FORWARD:
            self._require_values(exchange.reads)
        else:
            require(self._training and exchange.differentiable, "the exchange has no backward")
            require(self.exchanged.get((exchange.name, Pass.FORWARD), False), "its forward has not completed")
            self._require_gradients(exchange.writes)
        self.exchanged[key] = False

    def _wait(self, exchange: ExchangeShape, action: Action) -> None:
        assert action.direction is not None
        key = (exchange.name, action.direction)
        require(key in self.exchanged, "not issued")
        require(not self.exchanged[key], "already awaited")
        self.exchanged[key] = True
        if action.direction is Pass.FORWARD:
            self.values.update(exchange.writes)

    def _free(self) -> None:
        """Everything that the pass owes must have happened."""
        phases = [phase.name for phase in self._flow.phases]
        missing = [name for name in phases if name not in self.computed]
        require(not missing, f"forward of {', '.join(missing)} has not run")
        due = [(e.name, Pass.FORWARD) for e in self._flow.exchanges]
        if self._training:
            missing = [name for name in phases if name not in self.gradients]
            require(not missing, f"backward of {', '.join(missing)} has not run")
            require(not self.deferred, f"weight gradients of {', '.join(sorted(self.deferred))} have not run")
            due += [(e.name, Pass.BACKWARD) for e in self._flow.exchanges if e.differentiable]
        for name, direction in due:
            done = self.exchanged.get((name, direction), False)
            require(done, f"exchange {name}.{direction.value} has not completed")
        require(self._is_last or Pass.FORWARD in self.sent, "its output was never handed on")
        if self._training:
            handed_on = self._is_first or Pass.BACKWARD in self.sent
            require(handed_on, "the gradient of its input was never handed on")
